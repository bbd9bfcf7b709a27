//! Configuration: a command line, the environment and a TOML file come in, one typed value goes out. Flags win over
//! the environment, that over the file, that over the defaults. Every flag `--some-thing` is also the environment
//! variable `PREFIX_SOME_THING` and the file's key `some-thing`; none needs declaring. No port is bound and nothing is
//! read but the file.
//!
//! How: what the environment and the file say is put in front of the real arguments as flags, so clap is the one
//! parser and the one judge of values.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, Command, Parser};
use serde::{Serialize, Serializer};

/// `EX_USAGE` of sysexits.h: the configuration is wrong, starting again will not help.
const EXIT_USAGE: i32 = 64;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read config file {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("config file {} is not valid TOML: {source}", path.display())]
    Syntax { path: PathBuf, source: Box<toml::de::Error> },
    #[error("config file {}: unknown key {key:?}", path.display())]
    UnknownKey { path: PathBuf, key: String },
    #[error("{origin}: {value} is not a string, number or boolean")]
    NotScalar { origin: String, value: String },
    #[error("{origin}: expected true or false, not {value:?}")]
    NotBoolean { origin: String, value: String },
    #[error("{origin}: {source}")]
    Value { origin: String, source: clap::Error },
    #[error(transparent)]
    CommandLine(clap::Error),
    #[error("cannot print the configuration: {0}")]
    Print(#[from] toml::ser::Error),
}

/// A number from 0 to 1, for flags.
pub fn ratio(text: &str) -> Result<f64, String> {
    let ratio: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=1.0).contains(&ratio) { Ok(ratio) } else { Err("it is not between 0 and 1".to_owned()) }
}

/// The effective configuration of this process. Prints it and exits 0 on `--print-config`; exits 64 with one message
/// on stderr when anything is wrong. An environment variable that is set but empty counts as not set.
pub fn load<T: Parser + Serialize>(env_prefix: &str) -> T {
    let env = |name: &str| std::env::var(name).ok();
    let code = match resolve(env_prefix, std::env::args_os().collect(), env) {
        Ok(Resolved::Run(config)) => return config,
        Ok(Resolved::Print(text)) => {
            print!("{text}");
            0
        }
        // Help and version are errors to clap; it knows the stream and the colours.
        Err(Error::CommandLine(error)) => {
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // Nothing sensible is left to do when stderr is closed.
            let _ = error.print();
            if asked { 0 } else { EXIT_USAGE }
        }
        Err(error) => {
            eprintln!("error: {error}");
            EXIT_USAGE
        }
    };
    // Before anything runs there is nothing to drain, and the exit status is the contract.
    #[allow(clippy::disallowed_methods)]
    std::process::exit(code);
}

/// For a field that is a name or a size with rules of its own: `#[serde(serialize_with = "config::as_text")]` shows it in
/// `--print-config` as it is written on the command line.
pub fn as_text<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// The same for one that may be left out.
pub fn as_optional_text<S: Serializer>(value: &Option<impl Display>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_none(),
    }
}

/// What the process shall do with its configuration.
#[derive(Debug)]
enum Resolved<T> {
    Run(T),
    Print(String),
}

/// One flag that did not come from the command line.
struct Injected {
    flag: String,
    origin: String,
}

fn resolve<T: Parser + Serialize>(
    env_prefix: &str,
    mut argv: Vec<OsString>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Resolved<T>, Error> {
    let command = command::<T>(env_prefix);
    let program = if argv.is_empty() { OsString::from(command.get_name()) } else { argv.remove(0) };
    let env = |flag: &str| {
        let name = env_name(env_prefix, flag);
        env(&name).filter(|value| !value.is_empty()).map(|value| (value, name))
    };
    let file = match given(&argv, "config").or_else(|| env("config").map(|(value, _)| value.into())) {
        Some(path) => Some(read(path.into(), &command)?),
        None => None,
    };

    let mut args = vec![program];
    let mut injected = Vec::new();
    for arg in command.get_arguments() {
        let Some(flag) = arg.get_long().filter(|flag| !is_given(&argv, flag)) else { continue };
        let from_file = || {
            let (path, table) = file.as_ref()?;
            let value = table.get(flag)?;
            Some((value.clone(), format!("config file {}: {flag}", path.display())))
        };
        let from_env = env(flag).map(|(value, name)| (toml::Value::String(value), format!("environment {name}")));
        let Some((value, origin)) = from_env.or_else(from_file) else { continue };
        args.extend(as_argument(arg, flag, value, &origin)?.map(OsString::from));
        injected.push(Injected { flag: flag.to_owned(), origin });
    }
    args.extend(argv);

    let matches = command.try_get_matches_from(args).map_err(|error| blame(error, &injected))?;
    let config = T::from_arg_matches(&matches).map_err(|error| blame(error, &injected))?;
    if matches.get_flag("print-config") {
        return Ok(Resolved::Print(print(&config)?));
    }
    Ok(Resolved::Run(config))
}

/// The derived command plus the two flags that every process has.
fn command<T: Parser>(env_prefix: &str) -> Command {
    T::command()
        .arg(Arg::new("config").long("config").value_name("FILE").help("TOML file with the same keys as these flags"))
        .arg(
            Arg::new("print-config")
                .long("print-config")
                .action(ArgAction::SetTrue)
                .help("Print the effective configuration as TOML and exit"),
        )
        .after_help(format!(
            "Every flag can also be given in the environment (--some-flag is {env_prefix}_SOME_FLAG) or as a key of \
             the config file (some-flag). Flags win over the environment, that over the file."
        ))
}

fn env_name(prefix: &str, flag: &str) -> String {
    format!("{prefix}_{}", flag.replace('-', "_").to_uppercase())
}

/// The arguments before a `--`, as text; one that is not UTF-8 can only be a value.
fn flags(argv: &[OsString]) -> impl Iterator<Item = (usize, &str)> {
    let until = argv.iter().position(|arg| arg == "--").unwrap_or(argv.len());
    argv[..until].iter().enumerate().filter_map(|(at, arg)| Some((at, arg.to_str()?)))
}

fn is_given(argv: &[OsString], flag: &str) -> bool {
    flags(argv).any(|(_, arg)| {
        arg.strip_prefix("--")
            .and_then(|arg| arg.strip_prefix(flag))
            .is_some_and(|rest| matches!(rest.get(..1), None | Some("=")))
    })
}

/// The value of `--flag VALUE` or `--flag=VALUE`.
fn given(argv: &[OsString], flag: &str) -> Option<OsString> {
    flags(argv).find_map(|(at, arg)| match arg.strip_prefix("--")?.strip_prefix(flag)? {
        "" => argv.get(at + 1).cloned(),
        rest => rest.strip_prefix('=').map(OsString::from),
    })
}

/// The file's keys and values. Keys may be written with `_` for `-`.
fn read(path: PathBuf, command: &Command) -> Result<(PathBuf, toml::Table), Error> {
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) => return Err(Error::Read { path, source }),
    };
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(source) => return Err(Error::Syntax { path, source: Box::new(source) }),
    };
    let mut known = toml::Table::new();
    for (key, value) in table {
        let flag = key.replace('_', "-");
        let is_key = command.get_arguments().any(|arg| arg.get_long() == Some(&flag));
        if !is_key || flag == "config" || flag == "print-config" {
            return Err(Error::UnknownKey { path, key });
        }
        known.insert(flag, value);
    }
    Ok((path, known))
}

/// `--flag=value`, or `--flag` for a switch that is on; nothing for one that is off.
fn as_argument(arg: &Arg, flag: &str, value: toml::Value, origin: &str) -> Result<Option<String>, Error> {
    let text = match value {
        toml::Value::String(text) => text,
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(on) => on.to_string(),
        other => return Err(Error::NotScalar { origin: origin.to_owned(), value: other.to_string() }),
    };
    if !matches!(arg.get_action(), ArgAction::SetTrue) {
        return Ok(Some(format!("--{flag}={text}")));
    }
    match text.as_str() {
        "true" | "1" => Ok(Some(format!("--{flag}"))),
        "false" | "0" => Ok(None),
        _ => Err(Error::NotBoolean { origin: origin.to_owned(), value: text }),
    }
}

/// Names the file or variable that a rejected value came from.
fn blame(error: clap::Error, injected: &[Injected]) -> Error {
    let Some(ContextValue::String(arg)) = error.get(ContextKind::InvalidArg) else { return Error::CommandLine(error) };
    let flag = arg.trim_start_matches('-').split([' ', '=']).next();
    match injected.iter().find(|injected| Some(injected.flag.as_str()) == flag) {
        Some(injected) => Error::Value { origin: injected.origin.clone(), source: error },
        None => Error::CommandLine(error),
    }
}

/// TOML with the flags' names as keys, so that the output is a config file.
fn print(config: &impl Serialize) -> Result<String, Error> {
    let table = toml::Table::try_from(config)?;
    let renamed: toml::Table = table.into_iter().map(|(key, value)| (key.replace('_', "-"), value)).collect();
    Ok(toml::to_string(&renamed)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[derive(Debug, Parser, Serialize)]
    struct Options {
        #[arg(long)]
        model: PathBuf,
        #[arg(long, default_value_t = 256)]
        queue: u32,
        #[arg(long)]
        id: Option<String>,
        #[arg(long)]
        die_with_parent: bool,
    }

    fn run(args: &[&str], env: &[(&str, &str)]) -> Result<Resolved<Options>, Error> {
        let argv = std::iter::once("process").chain(args.iter().copied()).map(OsString::from).collect();
        resolve("CONCLAVE", argv, |name| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    fn options(args: &[&str], env: &[(&str, &str)]) -> Options {
        match run(args, env).unwrap() {
            Resolved::Run(options) => options,
            Resolved::Print(text) => panic!("printed instead: {text}"),
        }
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn flags_win_over_environment_over_file_over_defaults() {
        let file = file("model = \"from-file\"\nqueue = 1\nid = \"file\"\n");
        let path = file.path().to_str().unwrap();
        let env = [("CONCLAVE_CONFIG", path), ("CONCLAVE_QUEUE", "2"), ("CONCLAVE_ID", "env")];

        let all = options(&["--id", "flag"], &env);
        assert_eq!((all.model.to_str(), all.queue, all.id.as_deref()), (Some("from-file"), 2, Some("flag")));

        let no_env = options(&["--config", path], &[]);
        assert_eq!((no_env.queue, no_env.id.as_deref()), (1, Some("file")));

        let defaults = options(&["--model=m"], &[("CONCLAVE_ID", "")]);
        assert_eq!((defaults.queue, defaults.id), (256, None));
    }

    #[test]
    fn a_switch_can_be_set_anywhere_and_only_to_a_boolean() {
        let file = file("die_with_parent = true\n");
        let path = file.path().to_str().unwrap();
        assert!(options(&["--model", "m", "--config", path], &[]).die_with_parent);
        assert!(!options(&["--model", "m", "--config", path], &[("CONCLAVE_DIE_WITH_PARENT", "0")]).die_with_parent);
        let error = run(&["--model", "m"], &[("CONCLAVE_DIE_WITH_PARENT", "maybe")]).unwrap_err();
        assert!(matches!(error, Error::NotBoolean { .. }), "{error}");
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file() {
        let file = file("model = \"m\"\nqueu = 1\n");
        let path = file.path().to_str().unwrap();
        let error = run(&["--config", path], &[]).unwrap_err().to_string();
        assert!(error.contains("queu") && error.contains(path), "{error}");
    }

    #[test]
    fn a_bad_value_is_blamed_on_where_it_came_from() {
        let file = file("queue = \"many\"\n");
        let path = file.path().to_str().unwrap();
        let from_file = run(&["--model", "m", "--config", path], &[]).unwrap_err().to_string();
        assert!(from_file.contains(path) && from_file.contains("many"), "{from_file}");
        let from_env = run(&["--model", "m"], &[("CONCLAVE_QUEUE", "-1")]).unwrap_err().to_string();
        assert!(from_env.contains("CONCLAVE_QUEUE"), "{from_env}");
        let from_flag = run(&["--model", "m", "--queue", "x"], &[]).unwrap_err();
        assert!(matches!(from_flag, Error::CommandLine(_)));
    }

    #[test]
    fn what_is_printed_can_be_loaded_again() {
        let Resolved::Print(text) = run(&["--model", "m", "--queue", "7", "--print-config"], &[]).unwrap() else {
            panic!("not printed");
        };
        let file = file(&text);
        let again = options(&["--config", file.path().to_str().unwrap()], &[]);
        assert_eq!((again.model.to_str(), again.queue, again.die_with_parent), (Some("m"), 7, false));
    }
}
