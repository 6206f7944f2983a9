//! What the ingress and each lane do with every event: taking the body apart, writing the record, reading it back. Run
//! with `cargo bench --bench event`.

use std::hint::black_box;
use std::time::SystemTime;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engage_relay::event::{self, Event, Parsed};

const BODY: &str = concat!(
    r#"{"message_id":"wamid.HBgMMzU5ODg0NjE4MTgAERgSTMwMTQ5ODY1NTFERUY0AA==","message_status":"delivered","#,
    r#""channel":{"channel_type":"Whatsapp","name":"Channel Name","sender_id":"5491122223333"},"#,
    r#""campaign":{"id":"074116ff-76f3-47b7-8be2-92f465718a3e","name":"campaign name"},"#,
    r#""event_name":"msg_status","event_timestamp":"1687548944","recipient":{"id":"541112341234"}}"#
);

fn encode(parsed: &Parsed<'_>, record: &mut Vec<u8>) {
    record.clear();
    parsed.encode(parsed.id(), SystemTime::UNIX_EPOCH, "aivo", None, record);
}

fn bench(criterion: &mut Criterion) {
    let array = format!("[{}]", vec![BODY; 100].join(","));
    // Names with escapes have to be unescaped, which allocates.
    let escaped = BODY.replace("Channel Name", r"Sucursal N\u00b0 1").replace("campaign name", r#"\"fr\u00edo\""#);
    let mut group = criterion.benchmark_group("event");
    for (name, body) in [("one", BODY), ("escaped", escaped.as_str()), ("array_of_100", array.as_str())] {
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(format!("parse/{name}"), |bencher| {
            bencher.iter(|| event::parse(black_box(body.as_bytes())).map(|events| events.len()));
        });
    }
    let parsed = event::parse(BODY.as_bytes()).expect("an event");
    let mut record = Vec::new();
    group.throughput(Throughput::Elements(1));
    group.bench_function("id", |bencher| bencher.iter(|| parsed.first().map(Parsed::id)));
    group.bench_function("encode", |bencher| {
        bencher.iter(|| parsed.iter().for_each(|parsed| encode(black_box(parsed), &mut record)));
    });
    let record = Bytes::from(record);
    group.bench_function("decode", |bencher| bencher.iter(|| Event::decode(black_box(record.clone())).is_ok()));
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
