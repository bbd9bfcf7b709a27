//! Names and numbers that tell things apart: workers, routers, clusters, layers, experts, plans, runs of a process.
//!
//! In: strings from flags and from the store. Out: types that cannot be mixed up. Never here: an invalid name, or a
//! `Default` that somebody could use by laziness.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::chance;

/// The longest name, in characters: a DNS label's limit, so that pod names fit.
pub const MAX_NAME: usize = 63;

/// A name that is not 1 to 63 characters of `[a-z0-9-.]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} name {name:?} is not 1 to {MAX_NAME} characters of a-z, 0-9, '-' and '.'")]
pub struct InvalidName {
    kind: &'static str,
    name: String,
}

fn check(kind: &'static str, name: &str) -> Result<Arc<str>, InvalidName> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(Arc::from(name))
    } else {
        let name = name.chars().take(MAX_NAME + 1).collect();
        Err(InvalidName { kind, name })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Takes a name of 1 to 63 characters of `[a-z0-9-.]`.
            pub fn parse(name: &str) -> Result<Self, InvalidName> {
                check($kind, name).map(Self)
            }

            /// The name as it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(name: &str) -> Result<Self, InvalidName> {
                Self::parse(name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// An expert worker. Its name outlives a restart; the [`Incarnation`] does not.
    WorkerId,
    "worker"
);
name!(
    /// A router.
    RouterId,
    "router"
);
name!(
    /// A cluster: the folder of the store that its members share.
    Cluster,
    "cluster"
);

/// A decoder layer, counted from 0 over all layers, dense ones included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerIdx(pub u32);

/// A routed expert of a layer, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpertId(pub u16);

/// A plan's number. 0 is no plan; the first is 1 and each names its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlanVersion(pub u64);

impl PlanVersion {
    /// What a process that acted on no plan yet reports.
    pub const NONE: PlanVersion = PlanVersion(0);
}

/// One run of a process, never 0: a worker that restarted under its old name is another worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(u64);

impl Incarnation {
    /// A new one, drawn at random.
    pub fn fresh() -> Self {
        Self(chance::draw(1..=u64::MAX))
    }

    /// One that was written down; `None` for 0.
    pub fn new(number: u64) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }

    /// The number to write down.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for LayerIdx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for PlanVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A name for a process that was given none: `<role>-<host>-<port>`, in the characters that names may have.
pub fn default_name(role: &str, host: &str, port: u16) -> String {
    let port = port.to_string();
    let room = MAX_NAME.saturating_sub(role.len() + port.len() + 2);
    let allowed = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' { c } else { '-' };
    let host: String = host.chars().map(|c| allowed(c.to_ascii_lowercase())).take(room).collect();
    format!("{role}-{host}-{port}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_a_pod_may_be_called() {
        assert_eq!(WorkerId::parse("worker-0.pod").unwrap().as_str(), "worker-0.pod");
        for bad in ["", "Worker", "a/b", "a b", "ü", &"x".repeat(64)] {
            assert!(WorkerId::parse(bad).is_err(), "{bad:?} should be refused");
        }
    }

    #[test]
    fn an_incarnation_is_never_zero() {
        assert!(Incarnation::new(0).is_none());
        assert_ne!(Incarnation::fresh(), Incarnation::fresh());
    }

    #[test]
    fn a_default_name_is_a_valid_name_whatever_the_host_is_called() {
        assert_eq!(default_name("worker", "Node_7.example", 7500), "worker-node-7.example-7500");
        for host in ["", "ü", &"x".repeat(300)] {
            let name = default_name("router", host, 65535);
            assert!(RouterId::parse(&name).is_ok(), "{name}");
        }
    }
}
