//! Children of `conclave up` end with it: when the parent is gone, however it went, the kernel sends SIGTERM and the
//! child drains. Never used by a process that an operator started on its own.

use rustix::process::{Signal, set_parent_process_death_signal};

/// Asks the kernel for SIGTERM when the parent dies. Call early: a parent that died before this call is not noticed.
///
/// The kernel watches the parent's *thread* that started this process, so the parent must start its children from a
/// thread that lives as long as itself.
pub fn die_with_parent() -> std::io::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM)).map_err(Into::into)
}
