//! A real balancer in front of several relays, and addresses for all of them that are known before they start.

use std::net::{SocketAddr, TcpListener};

use tokio::process::{Child, Command};

use crate::harness::Setup;

/// Addresses that nobody listens at now. Their ports are below those of outgoing connections, so that none of these takes
/// one before it is used, or while its relay is away.
pub(crate) fn unused_addresses<const N: usize>() -> [SocketAddr; N] {
    let mut listeners = Vec::new();
    while listeners.len() < N {
        listeners.extend(TcpListener::bind(("127.0.0.1", rand::random_range(10_000..20_000))));
    }
    std::array::from_fn(|index| listeners[index].local_addr().unwrap())
}

/// HAProxy in front of the relays. Ends with the value.
pub(crate) fn haproxy(setup: &Setup, front: SocketAddr, relays: &[(SocketAddr, SocketAddr)]) -> Child {
    let server = |(index, (ingress, admin)): (usize, &(SocketAddr, SocketAddr))| {
        format!(
            "  server relay{index} {ingress} check addr {} port {} inter 1s fall 1 rise 1\n",
            admin.ip(),
            admin.port()
        )
    };
    let servers: String = relays.iter().enumerate().map(server).collect();
    let config = setup.file(
        "haproxy.cfg",
        &format!(
            "global\n  maxconn 1000\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n  retries 0\nfrontend webhooks\n  bind {front}\n  default_backend relays\nbackend relays\n  balance roundrobin\n  option httpchk GET /readyz\n{servers}"
        ),
    );
    let mut command = Command::new("haproxy");
    let child = command.args(["-db", "-f"]).arg(config).kill_on_drop(true).spawn();
    child.expect("haproxy, of Debian's package of that name")
}
