//! Why a registration is refused, and what would change that.

use std::sync::Arc;

use super::super::process::{HostError, Process};
use super::{REGISTRATIONS_BURST, REGISTRATIONS_MAX};
use crate::mesh::caller::Task;

/// Each names the process, the value and (by [`RegisterError::remedy`]) the way out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    /// A part of the claim is out of its bounds.
    #[error("`{field}` {problem}")]
    Claim {
        /// Which part.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Too many registrations of one user.
    #[error("too many registrations of user {uid}, more than {REGISTRATIONS_BURST} at once")]
    TooFast {
        /// Whose.
        uid: u32,
    },
    /// Too many registrations in all.
    #[error("too many registrations, {REGISTRATIONS_MAX} tasks are alive")]
    Full,
    /// The process is not to be seen.
    #[error("process {pid} is not in /proc (any more)")]
    Gone {
        /// Which one.
        pid: u32,
    },
    /// The process is another user's than the one that connected.
    #[error("process {pid} connected as user {connected} and is user {now} now")]
    User {
        /// Which one.
        pid: u32,
        /// The socket's user.
        connected: u32,
        /// The process's user.
        now: u32,
    },
    /// The parents cannot all be seen.
    #[error("the parents of process {pid} cannot be followed up to the first process")]
    Lineage {
        /// Whose.
        pid: u32,
    },
    /// It is part of another task, or was another one before.
    #[error("process {pid} belongs to process {}, registered as {}", process.pid, named(task))]
    Other {
        /// Who asks.
        pid: u32,
        /// Who is registered.
        process: Process,
        /// As what.
        task: Arc<Task>,
    },
    /// It is in the cgroup of a task that is not known any more.
    #[error("process {pid} is in the cgroup of process {}, which is not known any more", process.pid)]
    Forgotten {
        /// Who asks.
        pid: u32,
        /// Whose cgroup it is.
        process: Process,
    },
    /// No part of Airflow that runs tasks is above it.
    #[error("no parent of process {pid} is a component that runs tasks; its parents are: {ancestry}")]
    NoRoot {
        /// Who asks.
        pid: u32,
        /// Names, nearest first.
        ancestry: String,
    },
    /// What is above it only looks like a part of Airflow.
    #[error("process {} above process {pid} is not believed to be `{part}`: process {} in its cgroup is, and is older", root.pid, elder.pid)]
    Usurped {
        /// Who asks.
        pid: u32,
        /// What is above it.
        root: Process,
        /// The one that is believed.
        elder: Process,
        /// What it would be.
        part: Arc<str>,
    },
    /// DAG files are parsed there, and no task is run.
    #[error("process {pid} is below process {}, which parses DAG files and runs no task", parser.pid)]
    Parser {
        /// Who asks.
        pid: u32,
        /// Above it.
        parser: Process,
    },
    /// A supervisor above it watches another task.
    #[error("process {pid} claims to be {claimed}, but process {} above it supervises {supervised}", supervisor.pid)]
    Supervised {
        /// Who asks.
        pid: u32,
        /// As what.
        claimed: String,
        /// Who supervises.
        supervisor: Process,
        /// What.
        supervised: String,
    },
    /// It says to be a supervisor, and its title does not.
    #[error("process {pid} claims to be the supervisor of {claimed}, but its title is {title:?}")]
    NoSupervisor {
        /// Who asks.
        pid: u32,
        /// As what.
        claimed: String,
        /// Its title, cut.
        title: String,
    },
    /// The host cannot be asked.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl RegisterError {
    /// What a person can do.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::Claim { .. } => "install the airflow-provider-ringfence of this ringfence's version",
            Self::TooFast { .. } => "start fewer tasks at once, or spread them over more workers",
            Self::Full => "end tasks, or spread them over more workers",
            Self::Gone { .. } => "mount /proc without hidepid for ringfence, or run it as root",
            Self::User { .. } => "register from the process that runs the task",
            Self::Lineage { .. } => "start the task with fewer processes between it and its worker",
            Self::Other { .. } => "a process and its children are one task; run the other as a task of its own",
            Self::Forgotten { .. } => "end what is left of that task; tasks started from now on are known",
            Self::NoRoot { .. } => "name the worker's unit, user or title in a [[component]] of the rules",
            Self::Usurped { .. } => {
                "run each worker as a systemd unit of its own; if it is no worker, a task tried to pass for one"
            }
            Self::Parser { .. } => "only running tasks register; guard calls at the top of a DAG file",
            Self::Supervised { .. } | Self::NoSupervisor { .. } => {
                "let the plugin register when the task starts; if it did, the task tried to pass for another"
            }
            Self::Host(_) => "run ringfence as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
        }
    }
}

/// A task for a message.
pub(crate) fn named(task: &Task) -> String {
    let Task { dag, task: id, run, try_number, map_index, .. } = task;
    let mapped = if *map_index < 0 { String::new() } else { format!("[{map_index}]") };
    format!("{dag}.{id}{mapped} of {run}, try {try_number}")
}
