//! Traces: spans over OTLP, where the settings ask for it. Without that there is no [`Traces`], and nothing is spent.
//!
//! A span has a place in a queue of limited length; what does not fit is dropped. A collector that can't be reached costs
//! a WARN a minute and nothing else. Attributes follow OpenTelemetry's semantic conventions. Of what is in events they hold
//! only what the rules put into the names of topics, exchanges and queues.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{Span as _, SpanBuilder, SpanKind, Status, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::tonic_types::metadata::MetadataMap;
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{
    ExporterBuildError, SpanExporter, WithExportConfig as _, WithHttpConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, Span as SdkSpan, SpanData,
};
use serde::Deserialize;
use tokio::runtime::Handle;
use tracing::warn;

use super::Config;

/// The most spans that wait to be sent.
const MAX_QUEUE: usize = 16_384;
/// How many are sent at once.
const BATCH: usize = 512;
/// How long a span waits for others, at most.
const DELAY: Duration = Duration::from_secs(1);
/// How long the collector may take for a batch.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the last spans may take at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a collector that fails is worth a line in the log.
const WARN_INTERVAL: Duration = Duration::from_secs(60);
/// What OTLP over HTTP appends to a collector's address.
const HTTP_PATH: &str = "v1/traces";

/// How spans travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OtlpProtocol {
    /// gRPC.
    Grpc,
    /// Protobuf over HTTP.
    Http,
}

/// Headers for the collector. Debug does not show their values, which may be secrets.
#[derive(Clone, Default, PartialEq, Deserialize)]
pub struct Headers(BTreeMap<String, String>);

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Headers {
    /// As HTTP has them; else the name of the one that it can't have.
    fn checked(&self) -> Result<HeaderMap, String> {
        let header = |(name, value): (&String, &String)| {
            let mut checked = value.parse::<HeaderValue>().map_err(|_| name.clone())?;
            checked.set_sensitive(true);
            Ok((name.parse::<HeaderName>().map_err(|_| name.clone())?, checked))
        };
        self.0.iter().map(header).collect()
    }
}

/// What is wrong with the settings.
pub(super) fn problems(config: &Config) -> Vec<String> {
    let endpoint = config.otlp_endpoint.as_deref().map(|endpoint| endpoint.parse::<http::Uri>());
    let usable = |uri: http::Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some();
    let endpoint = endpoint
        .is_some_and(|parsed| !parsed.is_ok_and(usable))
        .then(|| "telemetry.otlp_endpoint is not a URL such as \"http://localhost:4317\"".to_owned());
    let sample = (!(0.0..=1.0).contains(&config.trace_sample))
        .then(|| format!("telemetry.trace_sample is {}; it must be from 0 to 1", config.trace_sample));
    let header = config.otlp_headers.checked().err();
    let header =
        header.map(|name| format!("telemetry.otlp_headers has {name:?}, which with its value is no HTTP header"));
    [endpoint, sample, header].into_iter().flatten().collect()
}

/// Where spans go. Clones share it.
#[derive(Clone)]
pub struct Traces {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

impl Traces {
    /// Has to be called within a Tokio runtime; nothing is connected yet.
    ///
    /// # Errors
    ///
    /// The settings can't be used.
    pub(super) fn new(config: &Config, endpoint: &str) -> Result<Self, TracesError> {
        let headers = config.otlp_headers.checked().unwrap_or_default();
        let inner = match config.otlp_protocol {
            OtlpProtocol::Grpc => grpc(endpoint, headers)?,
            OtlpProtocol::Http => over_http(endpoint, headers)?,
        };
        let exporter = Exporter { inner: Arc::new(inner), runtime: Handle::current(), warned: Mutex::default() };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(MAX_QUEUE)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(DELAY)
            .build();
        let resource = Resource::builder()
            .with_service_name("engage-relay")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(config.trace_sample))))
            .with_resource(resource)
            .build();
        Ok(Self { tracer: provider.tracer("engage-relay"), provider })
    }

    /// Begins a span, as a child of the `traceparent` if that is one. It ends when it is dropped.
    pub fn span(&self, span: Begin, traceparent: Option<&str>) -> Span {
        let Begin { name, kind, attributes } = span;
        let builder = SpanBuilder::from_name(name).with_kind(kind).with_attributes(attributes);
        let parent = match traceparent {
            Some(given) => TraceContextPropagator::new().extract_with_context(&Context::new(), &Traceparent(given)),
            None => Context::new(),
        };
        Span(self.tracer.build_with_context(builder, &parent))
    }

    /// Sends what is left, in the time that there is for it.
    pub async fn close(self) {
        let close = move || self.provider.shutdown_with_timeout(CLOSE_TIMEOUT);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(close).await {
            warn!(%error, "the last traces were not sent");
        }
    }
}

fn grpc(endpoint: &str, headers: HeaderMap) -> Result<SpanExporter, ExporterBuildError> {
    let mut exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .with_metadata(MetadataMap::from_headers(headers));
    if endpoint.starts_with("https:") {
        exporter = exporter.with_tls_config(ClientTlsConfig::new().with_native_roots());
    }
    exporter.build()
}

fn over_http(endpoint: &str, headers: HeaderMap) -> Result<SpanExporter, TracesError> {
    let client = reqwest::Client::builder().timeout(EXPORT_TIMEOUT).no_proxy().default_headers(headers).build()?;
    // As OTLP has it: the address of a collector, or a whole URL.
    let is_whole = endpoint.parse::<http::Uri>().is_ok_and(|uri| !uri.path().trim_end_matches('/').is_empty());
    let endpoint = match is_whole {
        true => endpoint.to_owned(),
        false => format!("{}/{HTTP_PATH}", endpoint.trim_end_matches('/')),
    };
    let exporter = SpanExporter::builder().with_http().with_http_client(client);
    Ok(exporter.with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT).build()?)
}

/// Traces can't be sent as the settings say.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The exporter.
    #[error("traces can't be sent to telemetry.otlp_endpoint")]
    Exporter(#[from] ExporterBuildError),
    /// Its HTTP client.
    #[error("the client for telemetry.otlp_endpoint can't be made")]
    Client(#[from] reqwest::Error),
}

/// What is known of a span when it begins.
pub struct Begin {
    name: String,
    kind: SpanKind,
    attributes: Vec<KeyValue>,
}

impl Begin {
    /// A request that is served.
    pub fn server(name: impl Into<String>) -> Self {
        Self { name: name.into(), kind: SpanKind::Server, attributes: Vec::new() }
    }

    /// A request that is made.
    pub fn client(name: impl Into<String>) -> Self {
        Self { name: name.into(), kind: SpanKind::Client, attributes: Vec::new() }
    }

    /// A message that is sent.
    pub fn producer(name: impl Into<String>) -> Self {
        Self { name: name.into(), kind: SpanKind::Producer, attributes: Vec::new() }
    }

    /// Something else.
    pub fn internal(name: impl Into<String>) -> Self {
        Self { name: name.into(), kind: SpanKind::Internal, attributes: Vec::new() }
    }

    /// With an attribute.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.attributes.push(KeyValue::new(name, value.into()));
        self
    }
}

/// A span that has begun. It ends when it is dropped.
pub struct Span(SdkSpan);

impl Span {
    /// For whoever goes on from here, whether the span is sampled or not.
    pub fn traceparent(&self) -> String {
        let context = self.0.span_context();
        format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags())
    }

    /// Adds an attribute.
    pub fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        self.0.set_attribute(KeyValue::new(name, value.into()));
    }

    /// Says that what it stands for has failed: the kind of error, and for people what happened.
    pub fn fail(&mut self, kind: impl Into<Value>, text: impl Into<String>) {
        self.set("error.type", kind);
        self.0.set_status(Status::error(text.into()));
    }
}

/// A `traceparent` as a propagator takes it.
struct Traceparent<'a>(&'a str);

impl Extractor for Traceparent<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}

/// Sends from the relay's own runtime, and says now and then what goes wrong.
struct Exporter {
    inner: Arc<SpanExporter>,
    runtime: Handle,
    warned: Mutex<Option<Instant>>,
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").finish_non_exhaustive()
    }
}

impl opentelemetry_sdk::trace::SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (inner, spans) = (Arc::clone(&self.inner), batch.len());
        let sent = self.runtime.spawn(async move { inner.export(batch).await }).await;
        // It is only ever cancelled when the process ends, and that has been said.
        let result = sent.map_err(|error| OTelSdkError::InternalFailure(error.to_string()))?;
        if let Err(error) = &result {
            let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
            if warned.is_none_or(|at| at.elapsed() >= WARN_INTERVAL) {
                *warned = Some(Instant::now());
                warn!(%error, spans, "traces can't be sent to the collector, and are dropped; events are not affected");
            }
        }
        result
    }

    fn set_resource(&mut self, resource: &Resource) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.set_resource(resource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(endpoint: &str, sample: f64, headers: &[(&str, &str)]) -> Config {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config {
            otlp_endpoint: Some(endpoint.to_owned()),
            trace_sample: sample,
            otlp_headers: Headers(headers.collect()),
            ..Config::default()
        }
    }

    #[test]
    fn settings_are_checked() {
        let check = |endpoint, sample, headers: &[(&str, &str)], expected: Option<&str>| {
            let problems = problems(&config(endpoint, sample, headers));
            assert_eq!(problems.len(), usize::from(expected.is_some()), "{problems:?}");
            assert!(problems.concat().contains(expected.unwrap_or_default()));
        };
        check("http://localhost:4317", 1.0, &[("authorization", "Bearer s3cret")], None);
        check("https://collector.example.com/v1/traces", 0.0, &[], None);
        for wrong in ["", "localhost:4317", "ftp://localhost", "http://", "/v1/traces"] {
            check(wrong, 1.0, &[], Some("telemetry.otlp_endpoint"));
        }
        check("http://localhost", 1.5, &[], Some("telemetry.trace_sample is 1.5"));
        check("http://localhost", f64::NAN, &[], Some("telemetry.trace_sample"));
        check("http://localhost", 1.0, &[("a b", "x")], Some("\"a b\""));
        let secret = config("http://localhost", 1.0, &[("authorization", "s3cret\n")]);
        assert!(!format!("{:?}{secret:?}", problems(&secret)).contains("s3cret"));
    }

    #[tokio::test]
    async fn spans_go_on_from_a_traceparent() {
        let traces = |sample| Traces::new(&config("http://127.0.0.1:9", sample, &[]), "http://127.0.0.1:9").unwrap();
        let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let span = |traces: &Traces, parent| traces.span(Begin::server("x"), parent).traceparent();
        let child = span(&traces(0.0), Some(given));
        assert!(child.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && child.ends_with("-01"), "{child}");
        assert_ne!(child, given);
        let not_wanted = given.replace("-01", "-00");
        let unsampled = span(&traces(1.0), Some(&not_wanted));
        assert!(unsampled.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && unsampled.ends_with("-00"));
        assert!(span(&traces(1.0), None).ends_with("-01") && span(&traces(0.0), None).ends_with("-00"));
    }
}
