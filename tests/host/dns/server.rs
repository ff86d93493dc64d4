//! A name server that knows one address.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::namespace::Namespace;

/// The end of the header (RFC 1035, section 4.1.1), and a question's type and class behind its name.
const HEADER: usize = 12;
const ADDRESS_TYPE: [u8; 2] = [0, 1];

/// Answers each question for an address with the same one, and says how often it was asked. Ends with the test.
pub(super) struct Server {
    asked: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
}

impl Server {
    pub(super) fn spawn(namespace: &Namespace, at: Ipv4Addr, answer: Ipv4Addr) -> Self {
        let socket = namespace.run(|| UdpSocket::bind((at, 53)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let server = Self {
            asked: Arc::default(),
            end: Arc::default(),
        };
        let (asked, end) = (Arc::clone(&server.asked), Arc::clone(&server.end));
        std::thread::spawn(move || {
            let mut question = [0; 1500];
            while !end.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut question) else {
                    continue;
                };
                if let Some(reply) = reply(&question[..length], answer) {
                    asked.fetch_add(1, Ordering::Relaxed);
                    // Who asked may have gone.
                    drop(socket.send_to(&reply, from));
                }
            }
        });
        server
    }

    /// How often it was asked.
    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

fn reply(question: &[u8], answer: Ipv4Addr) -> Option<Vec<u8>> {
    let name_length = question.get(HEADER..)?.iter().position(|byte| *byte == 0)? + 1;
    let end = HEADER + name_length + 4;
    let mut reply = question.get(..end)?.to_vec();
    let known = reply[end - 4..end - 2] == ADDRESS_TYPE;
    // An answer, recursion wanted and available; one question, perhaps one answer, nothing else.
    reply[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(known), 0, 0, 0, 0]);
    if known {
        // The question's name; type A, class IN, kept for no time.
        reply.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        reply.extend(answer.octets());
    }
    Some(reply)
}
