//! The parts of an Airflow deployment: how each is named, what it listens on and what it connects to.
//!
//! Pure facts, tried on Airflow 3.3.2 and 2.11.2. Knows nothing of one host's ports and nothing of files.

/// A part of Airflow that runs as a unit of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Scheduler,
    /// The web server of Airflow 2.
    ApiServer,
    Worker,
    Triggerer,
    DagProcessor,
}

/// Which Airflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Release {
    Two,
    Three,
}

/// What runs the tasks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Executor {
    /// Workers, fed by a broker.
    Celery,
    /// The scheduler itself.
    Local,
}

/// Something that a part of Airflow connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Need {
    Database,
    Broker,
    ResultBackend,
    ExecutionApi,
}

impl Role {
    pub(super) const ALL: [Self; 5] = [Self::Scheduler, Self::ApiServer, Self::Worker, Self::Triggerer, Self::DagProcessor];

    /// The value of `-role`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|role| role.word() == text);
        // What Airflow 2 calls it.
        let found = found.or_else(|| (text == "webserver").then_some(Self::ApiServer));
        found.ok_or_else(|| {
            let words = Self::ALL.map(Self::word).join(", ");
            format!("`{text}` is no role; write one of {words}, and -role again for each further role of this host")
        })
    }

    pub(super) fn word(self) -> &'static str {
        self.component(Release::Three)
    }

    /// Its name in this release, which is the end of its service's and its unit's name.
    pub(super) fn component(self, release: Release) -> &'static str {
        match (self, release) {
            (Self::Scheduler, _) => "scheduler",
            (Self::ApiServer, Release::Three) => "api-server",
            (Self::ApiServer, Release::Two) => "webserver",
            (Self::Worker, _) => "worker",
            (Self::Triggerer, _) => "triggerer",
            (Self::DagProcessor, _) => "dag-processor",
        }
    }

    /// Where it listens for others, if it does.
    pub(super) fn app_port(self) -> Option<u16> {
        match self {
            Self::ApiServer => Some(8_080),
            Self::Worker => Some(8_793),
            Self::Triggerer => Some(8_794),
            Self::Scheduler | Self::DagProcessor => None,
        }
    }

    /// Whether that is the server of task logs, which binds every address whatever is set.
    pub(super) fn serves_logs(self) -> bool {
        matches!(self, Self::Worker | Self::Triggerer)
    }

    /// What it connects to.
    pub(super) fn needs(self, release: Release, executor: Executor) -> Vec<Need> {
        let celery = executor == Executor::Celery;
        let (two, three) = (release == Release::Two, release == Release::Three);
        let wanted = |need| match (self, need) {
            // From 3 on tasks reach the database through the execution API only.
            (Self::Worker, Need::Database) => two,
            (_, Need::Database) => true,
            (Self::Scheduler | Self::Worker, Need::Broker | Need::ResultBackend) => celery,
            (Self::Worker, Need::ExecutionApi) => three,
            (Self::Scheduler, Need::ExecutionApi) => three && !celery,
            _ => false,
        };
        Need::ALL.into_iter().filter(|need| wanted(*need)).collect()
    }

    /// Whether tasks are its children.
    pub(super) fn runs_tasks(self, executor: Executor) -> bool {
        match executor {
            Executor::Celery => self == Self::Worker,
            Executor::Local => self == Self::Scheduler,
        }
    }

    /// Whether it runs code of many tasks in one process and can tell ringfence which is which. In Airflow 2 a trigger does not
    /// know its task.
    pub(super) fn leases(self, release: Release) -> bool {
        self == Self::Triggerer && release == Release::Three
    }

    /// Whether code of DAGs opens connections in it: it gets the secrets backend, and the upstreams of tasks.
    pub(super) fn hosts_dag_code(self, executor: Executor) -> bool {
        self == Self::Triggerer || self.runs_tasks(executor)
    }
}

impl Release {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text.split('.').next() {
            Some("2") => Ok(Self::Two),
            Some("3") => Ok(Self::Three),
            _ => Err(format!("`{text}` is no supported Airflow; write 2 or 3")),
        }
    }

    pub(super) fn digit(self) -> &'static str {
        match self {
            Self::Two => "2",
            Self::Three => "3",
        }
    }
}

impl Executor {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().trim_end_matches("executor") {
            "celery" => Ok(Self::Celery),
            "local" => Ok(Self::Local),
            _ => Err(format!("`{text}` is no executor that runs on such hosts; write celery or local")),
        }
    }
}

impl Need {
    pub(super) const ALL: [Self; 4] = [Self::Database, Self::Broker, Self::ResultBackend, Self::ExecutionApi];

    /// In words, for comments and descriptions.
    pub(super) fn words(self) -> &'static str {
        match self {
            Self::Database => "metadata database",
            Self::Broker => "Celery broker",
            Self::ResultBackend => "Celery result backend",
            Self::ExecutionApi => "execution API",
        }
    }

    /// In which protocol a denied client is told so.
    pub(super) fn deny_reply(self) -> &'static str {
        match self {
            Self::Database | Self::ResultBackend => "postgres",
            Self::Broker => "redis",
            Self::ExecutionApi => "http",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_by_their_names_in_both_releases() {
        for role in Role::ALL {
            assert_eq!(Role::parse(role.word()), Ok(role));
        }
        assert_eq!(Role::parse("webserver"), Ok(Role::ApiServer));
        let error = Role::parse("sheduler").unwrap_err();
        assert!(error.contains("`sheduler`") && error.contains("scheduler, api-server, worker"), "{error}");
    }

    #[test]
    fn a_worker_of_airflow_3_stays_away_from_the_metadata_database() {
        let needs = Role::Worker.needs(Release::Three, Executor::Celery);
        assert_eq!(needs, [Need::Broker, Need::ResultBackend, Need::ExecutionApi]);
        let needs = Role::Worker.needs(Release::Two, Executor::Celery);
        assert_eq!(needs, [Need::Database, Need::Broker, Need::ResultBackend]);
    }

    #[test]
    fn whoever_runs_the_tasks_talks_to_what_feeds_them() {
        let needs = |executor| Role::Scheduler.needs(Release::Three, executor);
        assert_eq!(needs(Executor::Celery), [Need::Database, Need::Broker, Need::ResultBackend]);
        assert_eq!(needs(Executor::Local), [Need::Database, Need::ExecutionApi]);
        assert!(Role::Scheduler.runs_tasks(Executor::Local) && !Role::Scheduler.runs_tasks(Executor::Celery));
        for role in [Role::ApiServer, Role::Triggerer, Role::DagProcessor] {
            assert_eq!(role.needs(Release::Three, Executor::Celery), [Need::Database]);
        }
    }

    #[test]
    fn releases_and_executors_are_read_as_people_write_them() {
        assert_eq!((Release::parse("2.11.2"), Release::parse("3")), (Ok(Release::Two), Ok(Release::Three)));
        assert!(Release::parse("1.10").is_err() && Release::parse("").is_err());
        assert_eq!((Executor::parse("CeleryExecutor"), Executor::parse("local")), (Ok(Executor::Celery), Ok(Executor::Local)));
        assert!(Executor::parse("kubernetes").is_err());
    }
}
