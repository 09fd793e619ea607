//! Sockets behind one address: the kernel chooses among them by connection ID (a classic BPF program on the first
//! payload bytes, ADR 4).
//!
//! ```text
//!  control datagrams, control-kind IDs  -> socket `control`
//!  everything else                      -> socket `first nonce byte mod spread`
//! ```
//! Any socket may still get any packet: the kernel may merge a control datagram into another's batch, and where it can't
//! run such programs it chooses by address.

use std::io;
use std::os::fd::BorrowedFd;

use crate::socket_option;

/// Where the nonce starts within a connection ID ([`crate::cid`]).
const NONCE: u32 = 8;
const SHORT_DCID: u32 = 1;
const LONG_DCID: u32 = 6;

/// Attaches a program to the reuseport group of `socket`: it returns the index of the socket that takes a datagram.
pub fn attach(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // The filter array is alive, too; the kernel copies both.
    socket_option::set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_REUSEPORT_CBPF, &program)
}

/// The program: sockets are numbered in the order in which they were bound. Loads beyond a packet's end end it with 0.
pub fn program(spread: usize, control: usize) -> Vec<libc::sock_filter> {
    let control = u32::try_from(control).unwrap_or(0);
    let spread = u32::try_from(spread).unwrap_or(1).max(1);
    let op = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let load = |at: u32| op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, at);
    let and = |mask: u32| op(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask);
    let answer = |index: u32| op(libc::BPF_RET | libc::BPF_K, index);
    let equal = |value: u32, then: u8, otherwise: u8| libc::sock_filter {
        code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        jt: then,
        jf: otherwise,
        k: value,
    };
    // Seven instructions: kind control (2) to the control socket, the others by nonce.
    let by_id = |at: u32| {
        [
            load(at),
            and(0b0011_1000),
            equal(2 << 3, 3, 0),
            load(at + NONCE),
            op(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, spread),
            op(libc::BPF_RET | libc::BPF_A, 0),
            answer(control),
        ]
    };
    let mut program = vec![load(0), and(0xc0), equal(0x40, 2, 0), equal(0xc0, 8, 0), answer(control)];
    program.extend(by_id(SHORT_DCID));
    program.extend(by_id(LONG_DCID));
    program
}
