//! A denied connection in words, the same for the log, the admin port and the client that was turned away.

use std::fmt;

use super::close::CloseReason;
use super::record::ConnectionRecord;
use crate::mesh::caller::{Caller, Who};
use crate::policy::Denied;

/// Names one denial on this host, to ask about it later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DenialId(u64);

impl DenialId {
    /// The `number`-th denial of `worker` in a process that started at `epoch` (seconds; the low 24 bits are kept).
    pub fn new(epoch: u64, worker: usize, number: u32) -> Self {
        Self((epoch & 0xff_ffff) << 40 | (worker as u64 & 0xff) << 32 | u64::from(number))
    }
}

impl fmt::Display for DenialId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Who it was, for a person: `task load of dag payroll (run r1, try 2)`.
#[derive(Debug)]
pub struct Name<'a>(pub &'a Caller);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.who {
            Who::Task(task) => {
                write!(f, "task {} of dag {} (run {}, try {}", task.task, task.dag, task.run, task.try_number)?;
                if task.map_index >= 0 {
                    write!(f, ", map index {}", task.map_index)?;
                }
                f.write_str(")")
            }
            Who::Component(name) => write!(f, "component {name}"),
            Who::Stranger(stranger) => {
                f.write_str("an unidentified process")?;
                match (stranger.pid, &*stranger.command) {
                    (Some(pid), "") => write!(f, " (pid {pid})")?,
                    (Some(pid), command) => write!(f, " (pid {pid}: {command})")?,
                    (None, _) => {}
                }
                stranger.uid.map_or(Ok(()), |uid| write!(f, " of uid {uid}"))
            }
        }
    }
}

/// Why a connection was denied, in one sentence; `None` when it was not.
pub fn reason(record: &ConnectionRecord) -> Option<String> {
    if let Some(caller) = &record.caller
        && let Err(refusal) = &caller.verdict
    {
        return Some(format!("{} has no mesh identity: {}", Name(caller), refusal.why));
    }
    let source = record.source.as_ref()?;
    let speaker = source.service_name().map_or(source.as_str(), |name| &*name.service);
    let whose = record.caller.as_deref().map(|caller| format!(" of {}", Name(caller))).unwrap_or_default();
    if record.reason == CloseReason::DeniedByPeer {
        return Some(format!("identity \"{speaker}\"{whose} was refused by the other side of \"{}\"", called(record)));
    }
    let decision = record.decision.as_ref().filter(|decision| !decision.allowed)?;
    Some(format!("identity \"{speaker}\"{whose} may not call \"{}\": {}", called(record), decision.by))
}

/// What would let it in; `None` when nobody was denied.
pub fn remedy(record: &ConnectionRecord) -> Option<String> {
    if let Some(caller) = &record.caller
        && let Err(refusal) = &caller.verdict
    {
        return Some(refusal.remedy.to_string());
    }
    let source = record.source.as_ref()?;
    if record.reason == CloseReason::DeniedByPeer {
        let speaker = source.service_name().map_or(source.as_str(), |name| &*name.service);
        return Some(format!("`consul intention check {speaker} {}` says which intention decides", called(record)));
    }
    let decision = record.decision.as_ref().filter(|decision| !decision.allowed)?;
    Some(Denied { by: decision.by.clone() }.remedy(source, called(record)))
}

/// The called service: what a denied connection would have reached.
fn called(record: &ConnectionRecord) -> &str {
    match (&record.upstream, &record.destination) {
        // A caller here, turned away before anything was dialed: the identity that the upstream expects.
        (Some(upstream), destination) => {
            destination.as_ref().and_then(|id| id.service_name()).map_or(upstream, |name| &*name.service)
        }
        (None, _) => &record.service,
    }
}
