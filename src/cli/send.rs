//! `engage-relay send`: posts realistic sample events, for trials and load.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, ErrorKind, Write as _};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use http::StatusCode;
use indicatif::ProgressBar;
use serde_json::json;

use super::{Global, bar, print};
use crate::config::Config;
use crate::ingress::{AuthConfig, Signed};

/// The rates that can be kept, in events a second.
const RATES: RangeInclusive<f64> = 0.001..=1_000_000.0;
/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a sender pauses after it could not connect.
const PAUSE: Duration = Duration::from_millis(50);
/// The most requests at once; this machine has not many more ports.
const MAX_CONNECTIONS: u64 = 10_000;
/// Exit status after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;
/// The longest latency that is told apart, in microseconds.
const MAX_LATENCY_US: u64 = 60_000_000;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// How many events to post
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// How many events a second; without it, as fast as they are answered
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Where to [default: what the settings say]
    #[arg(long)]
    url: Option<String>,
    /// The token [default: the first of the settings, or the one that the relay made up, or none]
    #[arg(long)]
    token: Option<String>,
    /// PEM file with the authorities to trust [default: the system's]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// PEM file with a client certificate and its private key
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// How many requests at once
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=MAX_CONNECTIONS))]
    connections: u64,
    /// Makes the events differ from those of another run
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write each event that was acknowledged to this file, one JSON object a line: id and body
    #[arg(long, value_name = "FILE")]
    acked: Option<PathBuf>,
}

pub(super) fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (config, _) = global.settings()?;
    let sender = Sender::new(arguments, &config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (started, has_token) = (Instant::now(), sender.token.is_some());
    let (tally, end) = runtime.block_on(sender.send(arguments, global.json))?;
    print(&tally.summary(started.elapsed(), global.json, has_token)?)?;
    Ok(match end? {
        End::Sent if tally.accepted == arguments.count => ExitCode::SUCCESS,
        End::Sent => ExitCode::FAILURE,
        End::Interrupted => ExitCode::from(INTERRUPTED),
    })
}

/// How it ended.
enum End {
    Sent,
    Interrupted,
}

/// Posts events; shared by all connections.
struct Sender {
    client: reqwest::Client,
    url: reqwest::Url,
    token: Option<(String, String)>,
    signed: Option<Signed>,
    next: AtomicU64,
    tally: Mutex<Tally>,
}

/// What came of it.
struct Tally {
    answers: BTreeMap<String, u64>,
    accepted: u64,
    latencies_us: Histogram<u64>,
    acked: Option<File>,
}

impl Sender {
    fn new(arguments: &Arguments, config: &Config) -> anyhow::Result<Self> {
        let url = arguments
            .url
            .clone()
            .unwrap_or_else(|| super::url(config.ingress.listen, config.ingress.tls.is_some()) + &config.ingress.path);
        let url = url.parse().with_context(|| format!("--url {url:?} is not a URL"))?;
        let acked = arguments
            .acked
            .as_ref()
            .map(|path| File::create(path).with_context(|| format!("can't write {}", path.display())));
        let tally = Tally {
            answers: BTreeMap::new(),
            accepted: 0,
            latencies_us: Histogram::new_with_bounds(1, MAX_LATENCY_US, 3)?,
            acked: acked.transpose()?,
        };
        let client = super::client(arguments.ca.as_deref(), arguments.cert.as_deref())?;
        let client = client.timeout(TIMEOUT).tcp_nodelay(true).build()?;
        let signed = config.ingress.signature.as_ref().map(Signed::new).transpose();
        let signed = signed.map_err(|problems| anyhow::Error::msg(problems.join("\n")))?;
        let (token, next, tally) = (token(arguments, config)?, AtomicU64::new(0), Mutex::new(tally));
        Ok(Self { client, url, token, signed, next, tally })
    }

    /// What came of it, also where it ended early.
    async fn send(self, arguments: &Arguments, json: bool) -> anyhow::Result<(Tally, anyhow::Result<End>)> {
        let progress = if json { ProgressBar::hidden() } else { ProgressBar::new(arguments.count) };
        progress.set_style(bar()?);
        let started = tokio::time::Instant::now();
        let connections = (0..arguments.connections.min(arguments.count)).map(|_| async {
            loop {
                let number = self.next.fetch_add(1, Ordering::Relaxed);
                if number >= arguments.count {
                    return anyhow::Ok(());
                }
                if let Some(rate) = arguments.rate {
                    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
                    let due = Duration::from_secs_f64(number as f64 / rate);
                    tokio::time::sleep_until(started + due).await;
                }
                let noted = self.post(number, sample(arguments.seed, number)).await;
                noted.context("can't write to the file of acknowledged events")?;
                progress.inc(1);
            }
        });
        let end = tokio::select! {
            biased;
            interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| End::Interrupted).map_err(Into::into),
            sent = futures_util::future::try_join_all(connections) => sent.map(|_| End::Sent),
        };
        progress.finish_and_clear();
        Ok((self.tally.into_inner().unwrap_or_else(PoisonError::into_inner), end))
    }

    /// Fails only where the event can't be noted.
    async fn post(&self, number: u64, body: String) -> io::Result<()> {
        let started = Instant::now();
        let mut request =
            self.client.post(self.url.clone()).header("content-type", "application/json").body(body.clone());
        if let Some((header, token)) = &self.token {
            request = request.header(header, token);
        }
        if let Some(signed) = &self.signed {
            for (header, value) in signed.sign(&format!("msg_{number}"), body.as_bytes(), SystemTime::now()) {
                request = request.header(header, value);
            }
        }
        let answer = match request.send().await {
            Ok(response) => {
                let status = response.status();
                response.bytes().await.map(|content| (status, content))
            }
            Err(error) => Err(error),
        };
        let latency = u64::try_from(started.elapsed().as_micros()).unwrap_or(MAX_LATENCY_US);
        let failed = answer.is_err();
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).count(answer, latency, &body)?;
        if failed {
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

impl Tally {
    fn count(
        &mut self,
        answer: reqwest::Result<(StatusCode, bytes::Bytes)>,
        latency_us: u64,
        body: &str,
    ) -> io::Result<()> {
        let mut noted = Ok(());
        let answer = match answer {
            Ok((status, content)) => {
                self.latencies_us.saturating_record(latency_us);
                if status == StatusCode::OK {
                    self.accepted += 1;
                    noted = self.note(&content, body);
                }
                status.as_u16().to_string()
            }
            Err(error) if error.is_timeout() => "no answer in time".to_owned(),
            Err(error) if error.is_connect() => format!("not connected: {}", causes(&error)),
            Err(error) => format!("connection lost: {}", causes(&error)),
        };
        *self.answers.entry(answer).or_default() += 1;
        noted
    }

    fn note(&mut self, content: &[u8], body: &str) -> io::Result<()> {
        let Some(file) = &mut self.acked else { return Ok(()) };
        let answer: serde_json::Value = serde_json::from_slice(content).unwrap_or_default();
        let id = answer.pointer("/ids/0").and_then(serde_json::Value::as_str).unwrap_or_default();
        writeln!(file, "{}", json!({ "id": id, "body": body }))
    }

    /// What came of it, as JSON or for people. Whoever was refused without a token is told how to give one.
    fn summary(&self, took: Duration, json: bool, has_token: bool) -> anyhow::Result<String> {
        let latency = |quantile| self.latencies_us.value_at_quantile(quantile);
        let rate = Duration::from_secs(self.accepted.min(u32::MAX.into())).as_secs_f64() / took.as_secs_f64().max(1e-9);
        if json {
            let latencies = json!({ "p50": latency(0.5), "p90": latency(0.9), "p99": latency(0.99), "max": self.latencies_us.max() });
            let summary = json!({ "accepted": self.accepted, "answers": self.answers, "seconds": took.as_secs_f64(), "accepted_per_second": rate, "latency_us": latencies });
            return Ok(format!("{summary}\n"));
        }
        let mut text = format!("{} accepted in {:.2} s, {rate:.0}/s\n", self.accepted, took.as_secs_f64());
        for (answer, count) in &self.answers {
            let hint = if answer == "401" && !has_token { NO_TOKEN } else { "" };
            writeln!(text, "  {count:>8}  {answer}{hint}")?;
        }
        let ms = |quantile| Duration::from_micros(latency(quantile)).as_secs_f64() * 1000.0;
        writeln!(text, "latency in ms: p50 {:.2}, p90 {:.2}, p99 {:.2}", ms(0.5), ms(0.9), ms(0.99))?;
        Ok(text)
    }
}

/// Stands beside the 401 of a relay that may want a token.
const NO_TOKEN: &str = ": no token was sent, since none is configured here; give --token";

/// Why there is no answer, from the outside in.
fn causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A rate as the command line takes it.
fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| RATES.contains(rate));
    rate.ok_or_else(|| format!("give a number from {} to {}", RATES.start(), RATES.end()))
}

/// The header to send, and its value.
fn token(arguments: &Arguments, config: &Config) -> anyhow::Result<Option<(String, String)>> {
    let default = AuthConfig::default();
    let auth = match &config.ingress.auth {
        // Here nobody wants a token, but the one that is given may be meant for elsewhere.
        AuthConfig::None if arguments.token.is_some() => &default,
        auth => auth,
    };
    let AuthConfig::Tokens { header, tokens } = auth else { return Ok(None) };
    if let Some(token) = &arguments.token {
        return Ok(Some((header.clone(), token.clone())));
    }
    if let Some(first) = tokens.first() {
        return Ok(Some((header.clone(), first.value.clone())));
    }
    let path = crate::ingress::generated_token_path(&config.data_dir);
    match std::fs::read_to_string(&path) {
        Ok(token) => Ok(Some((header.clone(), token.trim().to_owned()))),
        // The relay may be elsewhere, and want none.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("can't read {}", path.display())),
    }
}

/// Event number `number` of a run: messages of a few campaigns and senders, each with two or three statuses.
fn sample(seed: u64, number: u64) -> String {
    const STEPS: u64 = 3;
    let message = number / STEPS;
    let status = match (number % STEPS, message % 20) {
        (0, _) => "sent",
        (1, 19) => "error",
        (1, _) => "delivered",
        _ => "read",
    };
    let senders = ["5491122223333", "5491144445555", "34911223344", "4915112345678"];
    let sender = senders.get(usize::try_from(message % 4).unwrap_or(0)).copied().unwrap_or_default();
    let campaign = match message % 7 {
        0 => String::new(),
        campaign => format!(
            "\"campaign\":{{\"id\":\"074116ff-76f3-47b7-8be2-{campaign:012x}\",\"name\":\"campaign {campaign}\"}},"
        ),
    };
    format!(
        "{{\"message_id\":\"wamid.{seed:08x}{message:016x}\",\"message_status\":\"{status}\",\
         \"channel\":{{\"channel_type\":\"Whatsapp\",\"name\":\"Channel {sender}\",\"sender_id\":\"{sender}\"}},{campaign}\
         \"event_name\":\"msg_status\",\"event_timestamp\":\"{}\",\"recipient\":{{\"id\":\"5411{:08}\"}}}}",
        1_687_548_944 + number,
        message % 100_000_000,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{self, Field};

    #[test]
    fn samples_are_events_and_differ() {
        let mut ids = std::collections::HashSet::new();
        for (seed, number) in (0..2).flat_map(|seed| (0..300).map(move |number| (seed, number))) {
            let body = sample(seed, number);
            let events = event::parse(body.as_bytes()).unwrap();
            assert_eq!(events.len(), 1, "{body}");
            assert!(ids.insert(events[0].id().to_string()), "{body}");
        }
        assert!(Field::from_name("status").is_some());
    }
}
