//! Why a connection is nobody's, and what would change that.

use std::sync::Arc;

use super::super::process::{HostError, Process};

/// The reason for [`Tier::Unidentified`](crate::mesh::caller::Tier::Unidentified).
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unattributed {
    /// No process holds the socket any more, or none of its user ever did.
    #[error("its socket was closed, or passed to another user, before its process was found")]
    Gone,
    /// Too many searches for its user.
    #[error("too many unknown connections of its user")]
    TooMany,
    /// Its holder may be beyond the bounds of the search.
    #[error("too many processes or descriptors to look through")]
    TooLarge,
    /// Its holder may be among processes that cannot be looked into.
    #[error("the descriptors of {processes} processes may not be read")]
    Unreadable {
        /// How many.
        processes: usize,
    },
    /// Held by processes of different owners.
    #[error("several processes hold its socket, and are not of one task")]
    Several,
    /// The parents cannot all be seen.
    #[error("the parents of its process cannot be followed up to the first process")]
    Lineage,
    /// Its task was known to an earlier run only.
    #[error("its process is in the cgroup of process {}, which is not known any more", .0.pid)]
    Forgotten(Process),
    /// A task that has not registered.
    #[error("its process runs a task that has not registered")]
    Unregistered,
    /// It only looks like a part of Airflow.
    #[error("its process is not believed to be `{part}`: process {} in its cgroup is, and is older", elder.pid)]
    Usurped {
        /// The one that is believed.
        elder: Process,
        /// What it would be.
        part: Arc<str>,
    },
    /// Nothing points to Airflow.
    #[error("its process is no registered task, and no component of the rules")]
    Nobody,
    /// The host cannot be asked.
    #[error(transparent)]
    Host(#[from] HostError),
}

impl Unattributed {
    /// What a person can do.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::Gone => "give tasks a cgroup of their own (`cgroup = \"auto\"` with cgroup v2): it is known even after a close",
            Self::TooMany => "register the task, or name the process in a [[component]], so that no search is needed",
            Self::TooLarge => {
                "give tasks a cgroup of their own (`cgroup = \"auto\"` with cgroup v2), so that no search is needed"
            }
            Self::Unreadable { .. } => "run ringfence as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
            Self::Several => "open the connection in the process that uses it, after the fork",
            Self::Lineage => "start it with fewer processes between it and its worker, and mount /proc without hidepid",
            Self::Forgotten(_) => "end what is left of that task; tasks started from now on are known",
            Self::Unregistered => {
                "install airflow-provider-ringfence where tasks run, and look for its one line in the task's log"
            }
            Self::Usurped { .. } => "run each component as a systemd unit of its own",
            Self::Nobody => "run it as an Airflow task, or name its unit, user or title in a [[component]] of the rules",
            Self::Host(_) => "run ringfence as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
        }
    }
}
