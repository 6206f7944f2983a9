use rdkafka::ClientContext;
use rdkafka::mocking::MockCluster;

use super::*;

/// Settings of a journal on such a cluster, with the prefix `p`.
pub(super) fn config_of(cluster: &MockCluster<'_, impl ClientContext>) -> Config {
    config(|config| (config.brokers, config.prefix) = (vec![cluster.bootstrap_servers()], "p".to_owned()))
}

fn config(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config { brokers: vec!["kafka-0:9092".to_owned()], ..Config::default() };
    change(&mut config);
    config
}

#[test]
fn what_is_wrong_is_said() {
    assert_eq!(config(|_| {}).problems(), [""; 0]);
    let check = |change: fn(&mut Config), expected: &str| {
        let problems = config(change).problems();
        assert!(problems.len() == 1 && problems[0].contains(expected), "{problems:?}\n should have {expected}");
    };
    check(|config| config.brokers.clear(), "journal.brokers: the list of brokers is empty");
    check(|config| config.brokers.push("http://x:1".to_owned()), "is not a broker's address");
    check(|config| config.prefix.clear(), "journal.prefix has up to 200");
    check(|config| config.prefix = "a b".to_owned(), "journal.prefix has up to 200");
    check(|config| config.partitions = 0, "from 1 to 10000");
    check(|config| config.min_insync = 4, "from 1 to journal.replication, 3");
    check(|config| config.timeout = Duration::from_millis(99), "journal.timeout");
    check(|config| config.retention = Duration::from_secs(59), "journal.retention");
    check(|config| drop(config.options.insert("acks".into(), "1".into())), "\"acks\" cannot be set");
    check(|config| drop(config.options.insert("group.id".into(), "1".into())), "\"group.id\" cannot be set");
    check(|config| drop(config.options.insert("topic.acks".into(), "1".into())), "\"topic.acks\" cannot be set");
    check(|config| drop(config.options.insert("topic.auto.offset.reset".into(), "end".into())), "cannot be set");
    check(|config| drop(config.options.insert("no.such".into(), "1".into())), "does not know \"no.such\"");
    check(|config| drop(config.options.insert("max.in.flight".into(), "100".into())), "`max.in.flight` must be");
    let options = ["acks", "group.id", "no.such", "none.such"].map(|name| (name.to_owned(), "1".to_owned()));
    let all =
        Config { brokers: vec!["a b".into(), "c/d".into()], partitions: 0, options: options.into(), ..config(|_| {}) };
    assert_eq!(all.problems().len(), 7, "{:?}", all.problems());
}

#[test]
fn limits_are_within() {
    let check = |change: fn(&mut Config)| assert_eq!(config(change).problems(), [""; 0]);
    check(|config| config.prefix = "x".repeat(200));
    check(|config| config.partitions = 10_000);
    check(|config| config.min_insync = 3);
    check(|config| config.timeout = Duration::from_millis(100));
    check(|config| config.retention = Duration::from_secs(60));
}

#[test]
fn a_number_stands_for_a_place() {
    assert_eq!(number_of(0, 7).to_stored(), 7);
    assert!(number_of(1, 0) > number_of(0, (1 << OFFSET_BITS) - 1));
    assert_eq!(place_of(number_of(10_000, 5)), (10_000, 5));
}

#[test]
fn options_come_before_what_is_chosen() {
    let check = |options: &[(&str, &str)], compression: Option<&str>, in_flight: Option<&str>| {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let client = append::producer(&config(|config| config.options = options));
        assert_eq!((client.get("compression.type"), client.get("max.in.flight")), (compression, in_flight));
    };
    check(&[], Some("lz4"), Some("1"));
    check(&[("compression.type", "none"), ("max.in.flight", "5")], Some("none"), Some("5"));
    // By their other names.
    check(&[("compression.codec", "zstd"), ("max.in.flight.requests.per.connection", "2")], None, None);
}
