//! Who gets in: TLS on both ports, client certificates, addresses and signatures, and what that costs those who dally.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http::{Request, StatusCode, Version};
use http_body_util::Full;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use reqwest::{Certificate, Client, Identity};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::harness::{PATH, Raw, Receiver, Relay, Setup, TOKEN, event, eventually, webhook, within};

const SCREEN: &str = include_str!("../../routes.toml");

/// A certificate authority, and where it puts what it makes.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // A name of its own, or else clients take another's for it and complain of the signature.
        let dir = TempDir::new().unwrap();
        parameters.distinguished_name.push(DnType::CommonName, dir.path().to_str().unwrap());
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let authority = Self { issuer, dir };
        std::fs::write(authority.ca(), authority.issuer.pem()).unwrap();
        for name in ["server", "client"] {
            authority.issue(name, 2100);
        }
        authority
    }

    fn issue(&self, name: &str, year: i32) {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new(["localhost", "127.0.0.1"].map(str::to_owned)).unwrap();
        parameters.not_after = rcgen::date_time_ymd(year, 1, 2);
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.file(&format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
        std::fs::write(self.file(&format!("{name}.both")), certificate.pem() + &key.serialize_pem()).unwrap();
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// The setting `tls`, for clients of these authorities if any.
    pub(crate) fn setting(&self, client_ca: Option<&Self>) -> String {
        let client_ca = client_ca.map(|other| format!(", client_ca = {:?}", other.ca()));
        let [cert, key] = ["server.pem", "server.key"].map(|name| self.file(name));
        format!("{{ cert = {cert:?}, key = {key:?}{} }}", client_ca.unwrap_or_default())
    }

    /// A client that trusts this authority alone, with a certificate of another's.
    fn client(&self, identity: Option<&Self>) -> Client {
        self.builder(identity).build().unwrap()
    }

    fn builder(&self, identity: Option<&Self>) -> reqwest::ClientBuilder {
        // Others may have been first.
        drop(rustls::crypto::ring::default_provider().install_default());
        let ca = Certificate::from_pem(&std::fs::read(self.ca()).unwrap()).unwrap();
        let builder = Client::builder().no_proxy().tls_certs_only([ca]);
        let identity = identity.map(|other| Identity::from_pem(&std::fs::read(other.file("client.both")).unwrap()));
        identity.into_iter().fold(builder, |builder, identity| builder.identity(identity.unwrap()))
    }

    /// A connection that has done its handshake and nothing else.
    async fn handshake(&self, address: SocketAddr) -> tokio_rustls::client::TlsStream<TcpStream> {
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.ca()).unwrap()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let stream = TcpStream::connect(address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        within("a handshake", connector.connect(ServerName::try_from("localhost").unwrap(), stream)).await.unwrap()
    }
}

/// Where a relay takes webhooks over TLS.
pub(crate) fn https(address: SocketAddr) -> String {
    format!("https://localhost:{}{PATH}", address.port())
}

async fn post(client: &Client, address: SocketAddr, token: &str) -> reqwest::Result<(Version, StatusCode)> {
    let request = client.post(https(address)).header(TOKEN.0, token).body(event(1, "sent"));
    let answer = within("an answer", request.send()).await?;
    Ok((answer.version(), answer.status()))
}

#[tokio::test]
async fn both_protocols_over_tls() {
    let (authority, other) = (Authority::new(), Authority::new());
    let relay = Setup::new(SCREEN).env("RELAY_INGRESS__TLS", authority.setting(None)).start().await;
    let address = relay.address();
    let answered = post(&authority.client(None), address, TOKEN.1).await.unwrap();
    assert_eq!(answered, (Version::HTTP_2, StatusCode::OK));
    let http1 = authority.builder(None).http1_only().build().unwrap();
    assert_eq!(post(&http1, address, TOKEN.1).await.unwrap(), (Version::HTTP_11, StatusCode::OK));
    assert_eq!(post(&http1, address, "wrong").await.unwrap(), (Version::HTTP_11, StatusCode::UNAUTHORIZED));
    let error = post(&other.client(None), address, TOKEN.1).await.unwrap_err();
    assert!(error.is_connect(), "{error:?}");
    let mut cleartext = Raw::connect(address).await;
    cleartext.write(format!("POST {PATH} HTTP/1.1\r\nhost: relay\r\n\r\n")).await;
    assert!(!String::from_utf8_lossy(&cleartext.closed().await).contains("HTTP/"));
    // What others do wrong is no trouble of ours.
    let troubles: Vec<_> = relay.stop().await.into_iter().filter(|line| line["level"] != "INFO").collect();
    assert!(troubles.is_empty(), "{troubles:#?}");
}

#[tokio::test]
async fn clients_need_a_certificate_if_asked_for() {
    let (authority, other) = (Authority::new(), Authority::new());
    let relay = Setup::new(SCREEN).env("RELAY_INGRESS__TLS", authority.setting(Some(&other))).start().await;
    let status = post(&authority.client(Some(&other)), relay.address(), TOKEN.1).await.unwrap().1;
    assert_eq!(status, StatusCode::OK);
    for identity in [None, Some(&authority)] {
        assert!(post(&authority.client(identity), relay.address(), TOKEN.1).await.is_err());
    }
    relay.stop().await;
}

#[tokio::test]
async fn commands_reach_relays_with_tls() {
    let (authority, other) = (Authority::new(), Authority::new());
    let setup = Setup::new(SCREEN)
        .env("RELAY_INGRESS__TLS", authority.setting(None))
        .env("RELAY_INGRESS__SIGNATURE", "{ scheme = \"standard-webhooks\", secret = \"whsec_c2VjcmV0\" }")
        .env("RELAY_ADMIN__TLS", authority.setting(Some(&other)))
        .env("RELAY_ADMIN__TOKEN", "of-the-admin-side");
    let relay = setup.start().await;
    let admin = format!("https://localhost:{}", relay.admin().port());
    let [ca, wrong_ca, cert] = [authority.ca(), other.ca(), other.file("client.both")];
    let [ca, wrong_ca, cert] = [&ca, &wrong_ca, &cert].map(|path| path.to_str().unwrap());
    let status = ["status", "--json", "--admin", &admin];
    let done = setup.run(&[&status[..], &["--admin-ca", ca, "--admin-cert", cert]].concat(), "").await;
    assert!(done.code == Some(0) && done.stdout.contains("\"screen\""), "{done:?}");
    for (wrong, cause) in [
        (&["--admin-ca", wrong_ca, "--admin-cert", cert][..], "invalid peer certificate"),
        // With TLS 1.3 the client is done with its handshake when it is refused, and may see only that.
        (&["--admin-ca", ca], "can't be reached"),
        (&["--admin-ca", cert, "--admin-cert", ca], "must have a certificate and its private key"),
        (&["--admin-ca", "routes.toml"], "there is no PEM certificate in routes.toml"),
    ] {
        let done = setup.run(&[&status[..], wrong].concat(), "").await;
        assert!(done.code == Some(1) && done.stderr.contains(cause), "{wrong:?}: {done:?}");
    }
    let url = https(relay.address());
    let done = setup.run(&["send", "--count", "20", "--url", &url, "--ca", ca], "").await;
    assert!(done.code == Some(0) && done.stdout.starts_with("20 accepted"), "{done:?}");
    relay.stop().await;
}

#[tokio::test]
async fn check_warns_of_an_expired_certificate() {
    let authority = Authority::new();
    authority.issue("server", 2020);
    let done = Setup::new(SCREEN).env("RELAY_INGRESS__TLS", authority.setting(None)).run(&["check"], "").await;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(
        done.stdout.contains("warning: ingress.tls: the certificate has expired at 2020-01-02T00:00:00Z"),
        "{done:?}"
    );
}

#[tokio::test]
async fn check_and_start_say_which_file_is_wrong() {
    let authority = Authority::new();
    let wrong = authority.setting(None).replace("server.key", "client.key");
    let setup =
        Setup::new(SCREEN).env("RELAY_INGRESS__TLS", &*wrong).env("RELAY_ADMIN__TLS", wrong.replace(".pem", ""));
    for command in ["check", "run"] {
        let done = setup.run(&[command], "").await;
        assert_eq!(done.code, Some(64), "{done:?}");
        for problem in
            ["ingress.tls: the key in ", "client.key does not belong to", "admin.tls: can't read ", "server: No such"]
        {
            assert!([&done.stdout, &done.stderr].iter().any(|said| said.contains(problem)), "{problem}: {done:?}");
        }
    }
}

/// Posts one event after the other with the token of the moment, on a new connection every few requests; how many were
/// accepted, and what went wrong.
async fn keep_posting(
    authority: Arc<Authority>,
    address: SocketAddr,
    token: watch::Receiver<&'static str>,
    going: Arc<AtomicBool>,
) -> (u64, Option<String>) {
    let mut accepted = 0;
    while going.load(Ordering::Relaxed) {
        let client = authority.client(None);
        for _ in 0..10 {
            let sent = *token.borrow();
            match post(&client, address, sent).await {
                Ok((_, StatusCode::OK)) => accepted += 1,
                other => return (accepted, Some(format!("{sent}: {other:?}"))),
            }
        }
    }
    (accepted, None)
}

/// Changes files, and waits until the relay has loaded them.
async fn rotate(relay: &Relay, change: impl FnOnce()) {
    let before = relay.get("/api/v1/status").await["rules"]["last_reload"].clone();
    change();
    let now = relay.status_is("the files to be loaded", |status| status["rules"]["last_reload"] != before).await;
    assert_eq!(now["rules"]["last_reload"]["outcome"], "applied", "{now}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_certificates_and_secrets_rotate_under_load() {
    let authority = Arc::new(Authority::new());
    let receiver = Receiver::accepting().await;
    let setup = Setup::new("").without("RELAY_INGRESS__AUTH__TOKENS");
    let secret = setup.file("secret", "first");
    setup.file(
        "routes.toml",
        &format!(
            "[sinks.out]\ntype = \"http\"\nurl = \"{}\"\nheaders = {{ x-secret = \"${{file:{}}}\" }}\n[[routes]]\nto = [\"out\"]\n",
            receiver.url("/"),
            secret.display()
        ),
    );
    let tokens = |tokens: &str| setup.file("relay.toml", &format!("[ingress.auth]\ntokens = [{tokens}]\n"));
    let [one, two] = [r#"{ name = "one", value = "1" }"#, r#"{ name = "two", value = "2" }"#];
    tokens(one);
    let relay = setup.clone().env("RELAY_INGRESS__TLS", authority.setting(None)).start().await;
    let (token, going) = (watch::Sender::new("1"), Arc::new(AtomicBool::new(true)));
    let senders: Vec<_> = (0..3)
        .map(|_| keep_posting(Arc::clone(&authority), relay.address(), token.subscribe(), Arc::clone(&going)))
        .map(tokio::spawn)
        .collect();
    receiver.wait_for(10).await;

    rotate(&relay, || drop(tokens(&format!("{one}, {two}")))).await;
    token.send_replace("2");
    // Requests with the first token may be under way.
    receiver.wait_for(receiver.received().len() + 20).await;
    rotate(&relay, || drop(tokens(two))).await;
    assert_eq!(post(&authority.client(None), relay.address(), "1").await.unwrap().1, StatusCode::UNAUTHORIZED);

    let connected = authority.handshake(relay.address()).await;
    let served = |stream: &tokio_rustls::client::TlsStream<TcpStream>| {
        stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
    };
    rotate(&relay, || authority.issue("server", 2090)).await;
    assert_ne!(served(&connected), served(&authority.handshake(relay.address()).await));

    rotate(&relay, || drop(setup.file("secret", "second"))).await;
    let sent = receiver.received().len();
    receiver.wait_for(sent + 50).await;
    going.store(false, Ordering::Relaxed);
    let mut accepted = 0;
    for sender in senders {
        let (count, failed) = within("a sender's end", sender).await.unwrap();
        assert_eq!(failed, None);
        accepted += count;
    }
    let delivered = relay.sink_is("out", "has delivered all", |sink| sink["delivered"] == accepted).await;
    assert_eq!(delivered["attempts_failed"], 0, "{delivered}");
    let received = receiver.received();
    let secrets: Vec<_> = received.iter().map(|received| received.header("x-secret").to_owned()).collect();
    assert_eq!((secrets[0].as_str(), secrets[secrets.len() - 1].as_str()), ("first", "second"));
    relay.stop().await;
}

#[tokio::test]
async fn addresses_are_looked_at_before_tokens() {
    async fn check(relay: &Relay, forwarded_for: Option<&str>, token: &'static str, expected: u16) {
        let mut request = webhook(event(1, "sent"));
        request.headers_mut().insert(TOKEN.0, token.parse().unwrap());
        if let Some(addresses) = forwarded_for {
            request.headers_mut().insert("x-forwarded-for", addresses.parse().unwrap());
        }
        let answer = relay.send(request).await;
        assert_eq!(answer.status, expected, "{forwarded_for:?}: {answer:?}");
        if expected == 403 {
            assert_eq!(answer.header("content-type"), "application/problem+json");
            assert!(String::from_utf8_lossy(&answer.body).contains("ingress.allow"), "{answer:?}");
        }
    }
    let setup = Setup::new(SCREEN).env("RELAY_INGRESS__ALLOW", "[\"203.0.113.0/24\"]");
    let relay = setup.start().await;
    check(&relay, None, TOKEN.1, 403).await;
    check(&relay, Some("203.0.113.7"), TOKEN.1, 403).await;
    relay.stop().await;
    let relay = setup.env("RELAY_INGRESS__TRUSTED_PROXIES", "[\"127.0.0.1\", \"10.0.0.0/8\"]").start().await;
    check(&relay, None, TOKEN.1, 403).await;
    check(&relay, Some("198.51.100.1"), "wrong", 403).await;
    check(&relay, Some("203.0.113.7"), "wrong", 401).await;
    check(&relay, Some("203.0.113.7"), TOKEN.1, 200).await;
    check(&relay, Some("198.51.100.1, 203.0.113.7, 10.1.2.3"), TOKEN.1, 200).await;
    check(&relay, Some("203.0.113.7, 198.51.100.1"), TOKEN.1, 403).await;
    check(&relay, Some("203.0.113.7, rubbish"), TOKEN.1, 403).await;
    relay.stop().await;
}

#[tokio::test]
async fn silence_does_not_keep_a_connection() {
    let authority = Authority::new();
    let setup = Setup::new(SCREEN).env("RELAY_INGRESS__TLS", authority.setting(None));
    let relay = setup.env("RELAY_INGRESS__HEADER_TIMEOUT", "300ms").start().await;
    let mut silent = Raw::connect(relay.address()).await;
    let mut begun = Raw::connect(relay.address()).await;
    // A record of a handshake, most of which never comes.
    begun.write([0x16, 3, 1, 2, 0, 1, 0, 1]).await;
    let mut done = authority.handshake(relay.address()).await;
    let mut reading = authority.handshake(relay.address()).await;
    reading.write_all(b"POST /webhooks/engage HTTP/1.1\r\nhost: relay\r\n").await.unwrap();
    assert!(silent.closed().await.is_empty());
    begun.closed().await;
    let mut rest = Vec::new();
    drop(within("the end", done.read_to_end(&mut rest)).await);
    assert!(rest.is_empty(), "{rest:?}");
    within("an answer", reading.read_to_end(&mut rest)).await.unwrap();
    assert!(rest.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&rest));
    relay.stop().await;
}

/// Probes are answered though all places are taken.
#[tokio::test]
async fn silence_does_not_keep_the_admin_side() {
    const MAX: usize = 1024;
    let relay = Setup::new(SCREEN).env("RELAY_ADMIN__TOKEN", "of-the-admin-side").start().await;
    let mut silent = Vec::new();
    for number in 0..MAX {
        let mut connection = Raw::connect(relay.admin()).await;
        let begun: &[u8] = if number % 2 == 0 { b"P" } else { b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0" };
        connection.write(begun).await;
        silent.push(connection);
    }
    let since = Instant::now();
    for path in ["/healthz", "/readyz", "/metrics"] {
        let request = Request::get(path).header("host", "localhost").body(Full::default()).unwrap();
        assert_eq!(relay.ask(request).await.status, 200, "{path}");
    }
    assert!(since.elapsed() < Duration::from_secs(9), "{:?}", since.elapsed());
    for connection in &mut silent {
        connection.closed().await;
    }
    relay.stop().await;
}

#[tokio::test]
async fn a_flood_of_handshakes_takes_no_more_connections_than_there_may_be() {
    const MAX: usize = 4;
    let authority = Authority::new();
    let setup = Setup::new(SCREEN)
        .env("RELAY_INGRESS__TLS", authority.setting(None))
        .env("RELAY_INGRESS__HEADER_TIMEOUT", "200ms")
        .env("RELAY_INGRESS__MAX_CONNECTIONS", MAX.to_string());
    let relay = setup.start().await;
    let files = format!("/proc/{}/fd", relay.pid().as_raw_nonzero());
    // Other files come and go with the journal.
    let is_socket = |file: std::fs::DirEntry| {
        std::fs::read_link(file.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    };
    let open = || std::fs::read_dir(Path::new(&files)).unwrap().flatten().map(is_socket).filter(|is| *is).count();
    let before = open();
    let mut flood = Vec::new();
    for _ in 0..5 * MAX {
        flood.push(Raw::connect(relay.address()).await);
    }
    eventually("all places to be taken", async || open() >= before + MAX).await;
    let client = authority.client(None);
    let mut served = std::pin::pin!(post(&client, relay.address(), TOKEN.1));
    let mut most = 0;
    let status = loop {
        most = most.max(open());
        tokio::select! {
            answered = &mut served => break answered.unwrap().1,
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    };
    assert_eq!(status, StatusCode::OK, "those who came later get their turn");
    assert!(most <= before + MAX, "{most} sockets are open; {before} were before");
    relay.stop().await;
}
