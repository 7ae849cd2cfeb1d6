//! What a control plane has told since the start, and what that changed.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What was told, of each kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// Clusters.
    pub clusters: Updates,
    /// Listeners.
    pub listeners: Updates,
    /// Members of clusters.
    pub members: Arc<AllMembers>,
}

/// By proxy id and cluster.
pub type AllMembers = BTreeMap<Arc<str>, BTreeMap<Arc<str>, Members>>;

/// Answers of a control plane with resources of one kind, and what became of these.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Updates {
    /// What became of the answers.
    pub answers: Answers,
    /// What happened to the resources of this kind since the start.
    pub changes: Changes,
    /// Resources whose newest version waits for what it needs, now. Envoy waits no longer than `initial_fetch_timeout`, this
    /// proxy until it comes.
    pub warming: u64,
}

/// How many answers there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Answers {
    /// Taken whole.
    pub accepted: u64,
    /// Refused, at least in part.
    pub rejected: u64,
}

/// Resources that came and went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// There was none of the name. Those of the bootstrap count, as in Envoy.
    pub added: u64,
    /// Another version of one that was there. One that is sent again as it was is none.
    pub modified: u64,
    /// Taken away by the control plane.
    pub removed: u64,
}

/// What became of the members of one cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Members {
    /// How often some came or went; another health or weight of one that stays is none. Nor is a cluster that changed, which
    /// Envoy makes anew, so that its members come once more.
    pub changes: u64,
    /// What was told of them apart from the cluster itself, where that is so.
    pub fetched: Option<Fetched>,
}

/// Updates of one cluster's members.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    /// What became of them.
    pub answers: Answers,
    /// Of those accepted, the ones that changed nothing, not even a health.
    pub unchanged: u64,
    /// Of those accepted, the ones that told of no members any more; those before stay.
    pub empty: u64,
}

impl Answers {
    /// How often was asked: the next answer is always waited for.
    pub(super) fn attempts(self) -> u64 {
        self.accepted + self.rejected + 1
    }
}
