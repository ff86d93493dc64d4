//! Whose a connection on the loopback is: TCP has no `SO_PEERCRED`, but the kernel lists both ends with their users
//! (proc(5), `/proc/net/tcp`).

use std::net::{SocketAddr, SocketAddrV4};

/// Of this process's network, whatever else of /proc is hidden from it.
const LIST: &str = "/proc/self/net/tcp";
const ESTABLISHED: &str = "01";

/// The user whose socket is at `near` and connected to `far`; nothing in doubt.
pub(super) fn of(near: SocketAddr, far: SocketAddr) -> Option<u32> {
    let (SocketAddr::V4(near), SocketAddr::V4(far)) = (near, far) else {
        return None;
    };
    find(&std::fs::read_to_string(LIST).ok()?, near, far)
}

fn find(list: &str, near: SocketAddrV4, far: SocketAddrV4) -> Option<u32> {
    let (near, far) = (written(near), written(far));
    list.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
        // A socket that nobody holds any more is shown as root's.
        if local != near || remote != far || state != ESTABLISHED {
            return None;
        }
        fields.nth(3)?.parse().ok()
    })
}

/// As the kernel writes it: the address's bytes as one number of the machine.
fn written(address: SocketAddrV4) -> String {
    format!(
        "{:08X}:{:04X}",
        u32::from_ne_bytes(address.ip().octets()),
        address.port()
    )
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const LINES: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
        0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 100 1 0 100 0 0 10 0\n\
        1: 0100007F:C350 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 101 1 0 20 4 30 10 -1\n\
        2: 0100007F:C351 0100007F:1F90 04 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1\n\
        3: 0100007F:1F90 0100007F:C352 01 00000000:00000000 00:00000000 00000000     0        0 103 1 0 20 4 30 10 -1\n\
        4: 0100007F:C353 0100007F:1F90 01 00000000:00000000\n";

    #[cfg(target_endian = "little")]
    #[test]
    fn only_the_other_end_of_a_standing_connection_has_an_owner() {
        let proxy = "127.0.0.1:8080".parse().unwrap();
        let end = |port: u16| SocketAddrV4::new([127, 0, 0, 1].into(), port);
        assert_eq!(find(LINES, end(50000), proxy), Some(1000));
        for nobody in [50001, 50002, 50003, 50004, 8080] {
            assert_eq!(find(LINES, end(nobody), proxy), None, "{nobody}");
        }
        assert_eq!(find(LINES, end(50000), end(8081)), None);
        assert_eq!(find("", end(50000), proxy), None);
    }

    #[test]
    fn the_kernel_knows_our_own_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, far) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        assert_eq!(of(near, far), Some(nix::unistd::geteuid().as_raw()));
        let gone = SocketAddr::new(near.ip(), 1);
        assert_eq!(of(gone, far), None);
    }
}
