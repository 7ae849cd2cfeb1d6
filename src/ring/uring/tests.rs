//! The ring on the real kernel, with sockets of loopback.

use super::*;
use crate::ring::{Errno, SHARED_BUFFERS};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

fn uring(pool: &mut Pool) -> (Uring, EventFd) {
    let wake = EventFd::new().expect("eventfd");
    let options = StreamOptions { keepalive: Keepalive::Off };
    (Uring::new(pool, options, wake.try_clone().expect("dup")).expect("io_uring"), wake)
}

fn pair() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let (server, _) = listener.accept().expect("accept");
    (client, Socket(server.into_raw_fd()))
}

fn wait_for(ring: &mut Uring, op: Op) -> Completion {
    for _ in 0..100 {
        ring.turn(Some(Duration::from_millis(100))).expect("turn");
        while let Some(completion) = ring.next() {
            if completion.token.op() == Some(op) {
                return completion;
            }
        }
    }
    panic!("no {op:?} in time");
}

#[test]
fn bytes_arrive_in_a_shared_buffer_behind_its_headroom() {
    let mut pool = Pool::new(16 << 20).expect("pool");
    let (mut ring, _wake) = uring(&mut pool);
    let (mut client, server) = pair();
    ring.receive_shared(server, 16_384, true, Token::new(Op::Receive, 0, 1, 7));
    client.write_all(b"hello").expect("write");
    let completion = wait_for(&mut ring, Op::Receive);
    let buffer = completion.buffer.expect("a shared buffer");
    assert_eq!((completion.result, completion.token.generation()), (5, 7));
    let lease = ring.shared(buffer);
    assert_eq!(&pool.bytes(lease)[HEADROOM_BYTES..HEADROOM_BYTES + 5], b"hello");
    let span = pool.span(lease, HEADROOM_BYTES, 5);
    ring.send(server, &[span, span], Push::Now, Token::new(Op::Send, 0, 1, 7));
    assert_eq!(wait_for(&mut ring, Op::Send).result, 10);
    ring.recycle(buffer);
    let mut echoed = [0; 10];
    client.read_exact(&mut echoed).expect("read");
    assert_eq!(&echoed, b"hellohello");
    ring.close(server, false);
    ring.turn(Some(Duration::ZERO)).expect("turn");
    assert_eq!(client.read(&mut echoed).expect("end"), 0);
}

#[test]
fn cancel_ends_a_waiting_receive_and_close_can_reset() {
    let mut pool = Pool::new(16 << 20).expect("pool");
    let (mut ring, _wake) = uring(&mut pool);
    let (mut client, server) = pair();
    ring.receive_shared(server, 16_384, false, Token::new(Op::Receive, 1, 2, 1));
    ring.turn(Some(Duration::from_millis(10))).expect("turn");
    ring.cancel(server, Token::new(Op::Cancel, 1, 2, 1));
    let completion = wait_for(&mut ring, Op::Receive);
    assert_eq!(completion.outcome(), Err(Errno(libc::ECANCELED)));
    ring.close(server, true);
    ring.turn(Some(Duration::ZERO)).expect("turn");
    let error = client.read(&mut [0; 1]).expect_err("reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn shared_buffers_come_as_they_are_needed() {
    const SOCKETS: u32 = 140;
    let mut pool = Pool::new(64 << 20).expect("pool");
    let (mut ring, _wake) = uring(&mut pool);
    let pairs: Vec<_> = (0..SOCKETS).map(|_| pair()).collect();
    let receive = |ring: &mut Uring, slot: u32| {
        ring.receive_shared(pairs[slot as usize].1, 16_384, false, Token::new(Op::Receive, 0, slot, 1));
    };
    for (slot, (client, _)) in (0..).zip(&pairs) {
        let mut client: &TcpStream = client;
        client.write_all(b"x").expect("write");
        receive(&mut ring, slot);
    }
    let (mut held, mut empty) = (Vec::new(), 0);
    while held.len() < SOCKETS as usize {
        ring.turn(Some(Duration::from_millis(100))).expect("turn");
        while let Some(completion) = ring.next() {
            match (completion.outcome(), completion.buffer) {
                (Ok(1), Some(buffer)) => held.push(buffer),
                (Err(Errno(libc::ENOBUFS)), None) => {
                    empty += 1;
                    receive(&mut ring, completion.token.slot());
                }
                (Err(Errno(libc::EAGAIN)), _) => receive(&mut ring, completion.token.slot()),
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(empty > 0, "the first step was enough for all");
    assert!(ring.shared.provided < SHARED_BUFFERS, "{empty} that went without brought all of them");
    held.sort_unstable();
    held.dedup();
    assert_eq!(held.len(), SOCKETS as usize, "a buffer was handed out twice");
}

#[test]
fn another_thread_wakes_a_sleeping_ring_each_time() {
    let mut pool = Pool::new(16 << 20).expect("pool");
    let (mut ring, wake) = uring(&mut pool);
    for _ in 0..3 {
        wake.signal();
        wait_for(&mut ring, Op::Wake);
    }
}

#[test]
fn forbidden_operations_are_refused_by_the_kernel() {
    let mut pool = Pool::new(16 << 20).expect("pool");
    let (mut ring, _wake) = uring(&mut pool);
    ring.turn(Some(Duration::ZERO)).expect("turn");
    ring.push(opcode::Nop::new().build(), Token::new(Op::Connect, 0, 0, 0));
    assert_eq!(wait_for(&mut ring, Op::Connect).outcome(), Err(Errno(libc::EACCES)));
}
