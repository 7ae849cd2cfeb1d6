//! Access logs that the control plane asks for, and changes, while connections end.

use super::*;
use crate::config::LogTarget;
use crate::config::envoy::{AccessLog, AccessLogFormat};

#[tokio::test]
async fn what_consul_asks_for_is_written_and_can_be_changed() {
    let folder = tempfile::tempdir().expect("folder");
    let setting = |name: &str| AccessLog {
        target: LogTarget::File(folder.path().join(name)),
        format: AccessLogFormat::Text("%UPSTREAM_CLUSTER% %CONNECTION_ID%".into()),
        unmatched_only: false,
        only: None,
    };
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap_or_default();
    let mut port = port().await;
    let wanted = || port.worker.cells.access_facts.is_set();
    assert!(!wanted());
    port.status.send_replace(Status { access_logs: vec![setting("one")], ..Status::default() });
    wait(wanted).await;
    port.worker.send(Event::Connection(Box::new(inbound(true))));
    wait(|| read("one") == "local_app 1\n").await;
    // Another change of the status is none of the log's.
    port.status.send_replace(Status { ready: true, access_logs: vec![setting("one")], ..Status::default() });
    port.worker.send(Event::Connection(Box::new(inbound(true))));
    wait(|| read("one") == "local_app 1\nlocal_app 2\n").await;
    port.status.send_replace(Status { access_logs: vec![setting("two")], ..Status::default() });
    wait(|| folder.path().join("two").exists()).await;
    port.worker.send(Event::Connection(Box::new(inbound(true))));
    wait(|| read("two") == "local_app 3\n").await;
    port.status.send_replace(Status::default());
    let wanted = || port.worker.cells.access_facts.is_set();
    wait(|| !wanted()).await;
    port.worker.send(Event::Connection(Box::new(inbound(true))));
    port.shutdown.send_replace(true);
    port.running.await.expect("ends");
    assert_eq!((read("one").as_str(), read("two").as_str()), ("local_app 1\nlocal_app 2\n", "local_app 3\n"));
}

/// Until `done`, within a bound.
async fn wait(done: impl Fn() -> bool) {
    for _ in 0..500 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 5 s");
}
