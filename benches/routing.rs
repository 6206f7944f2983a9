//! What finding an event's sinks costs, by the number of routes. Run with `cargo bench --bench routing`.

use std::fmt::Write;
use std::hint::black_box;
use std::time::SystemTime;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use engage_relay::document::{Document, Environment};
use engage_relay::event::{self, Event};
use engage_relay::routing::{Scratch, Table};

const BODY: &str = r#"{"message_id":"wamid.HBgMMzU5ODg0NjE4MTgAERgSTMwMTQ5ODY1NTFERUY0AA==",
"message_status":"delivered",
"channel":{"channel_type":"Whatsapp","name":"Channel Name","sender_id":"5491122220000"},
"campaign":{"id":"074116ff-76f3-47b7-8be2-92f465718a3e","name":"campaign name"},
"event_name":"msg_status","event_timestamp":"1687548944","recipient":{"id":"541112341234"}}"#;

/// Routes by sender and status, as a company with many numbers has them; the last is the event's.
fn table(routes: usize) -> Table {
    let mut source = "[sinks.crm]\n[sinks.analytics]\n".to_owned();
    for number in (0..routes).rev() {
        let sender = 5_491_122_220_000_u64 + number as u64;
        let when =
            format!("{{ sender_id = '{sender}', status = ['delivered', 'read'], campaign_id = {{ exists = true }} }}");
        writeln!(source, "[[routes]]\nwhen = {when}\nto = ['crm', 'analytics']").expect("a String takes everything");
    }
    let document = Document::parse("routes.toml", &source, &Environment);
    let mut root = document.root();
    let sinks: Vec<_> = root.tables("sinks").into_iter().map(|(name, _)| name).collect();
    let table = Table::read(&mut root, &sinks);
    root.finish();
    assert_eq!(document.into_problems(), []);
    table
}

fn event() -> Event {
    let parsed = event::parse(BODY.as_bytes()).expect("an event").pop().expect("one");
    let mut record = Vec::new();
    parsed.encode(parsed.id(), SystemTime::now(), "aivo", None, &mut record);
    Event::decode(record.into()).expect("what was encoded")
}

fn routing(criterion: &mut Criterion) {
    let event = event();
    let mut group = criterion.benchmark_group("routing");
    for routes in [1, 100, 10_000] {
        let table = table(routes);
        let mut scratch = Scratch::default();
        assert_eq!(table.matches(&event, &mut scratch).len(), 2);
        group.bench_function(BenchmarkId::new("matches", routes), |bencher| {
            bencher.iter(|| table.matches(black_box(&event), &mut scratch).len());
        });
        let sink = table.sink("analytics").expect("it is there");
        group.bench_function(BenchmarkId::new("route_to", routes), |bencher| {
            bencher.iter(|| table.route_to(black_box(&event), sink, &mut scratch));
        });
    }
    group.finish();
}

criterion_group!(benches, routing);
criterion_main!(benches);
