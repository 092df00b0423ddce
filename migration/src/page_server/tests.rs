use super::*;
use qevm_nbd::{ClientDecoder, Export, Negotiation, Outcome};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};

const LEN: u64 = 300_000;

fn byte(at: u64) -> u8 {
    ((at * 7) >> 3) as u8
}

/// What a server answers to a read, from its offset and length.
type Answer = fn(&Request) -> Vec<u8>;

fn chunk(request: &Request, done: bool, content: Content<'_>) -> Vec<u8> {
    let mut writer = Writer::new();
    ServerEvent::Chunk(Chunk { done, cookie: request.cookie, content }).encode(&mut writer);
    if let Content::Data { offset, len } = content {
        (offset..offset + u64::from(len)).for_each(|at| {
            writer.u8(byte(at));
        });
    }
    writer.into_bytes()
}

/// A server of `connections` connections that answers each read with what `answer` gives, and then goes.
fn serve(path: &Path, connections: usize, structured: bool, answer: Answer) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        let clients: Vec<_> = (0..connections)
            .map(|_| {
                let stream = listener.accept().unwrap().0;
                thread::spawn(move || session(stream, structured, answer))
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap());
    })
}

fn session(stream: UnixStream, structured: bool, answer: Answer) {
    use std::io::Write;
    let export = Export { description: "a file".into(), len: LEN };
    let mut input = Driver::new(&stream, ClientDecoder::default());
    if (&stream).write_all(b"NBDMAGICIHAVEOPT\0\x03").is_err() {
        return;
    }
    let mut negotiation = Negotiation::default();
    loop {
        let mut reply = Writer::new();
        match input.next() {
            Ok(Some(ClientEvent::Option { option: option::STRUCTURED_REPLY, .. })) if !structured => {
                let option = option::STRUCTURED_REPLY;
                ServerEvent::OptionReply { option, reply: reply::ERR_UNSUP, data: b"" }.encode(&mut reply);
            }
            Ok(Some(ClientEvent::Option { option, data })) => {
                if negotiation.option(&export, option, data, &mut reply) == Outcome::Begin {
                    input.decoder_mut().begin();
                }
            }
            Ok(Some(ClientEvent::Request(request))) => drop(reply.bytes(&answer(&request))),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return,
        }
        if (&stream).write_all(reply.as_bytes()).is_err() {
            return;
        }
    }
}

fn server(folder: &Path, structured: bool, answer: Answer) -> (PageServer, JoinHandle<()>) {
    let path = folder.join("socket");
    let serving = serve(&path, CONNECTIONS, structured, answer);
    (PageServer::new(Address::Unix(path), String::new()), serving)
}

/// Why ten bytes from 100 on cannot be read.
fn failure(answer: Answer) -> io::Error {
    let folder = tempfile::tempdir().unwrap();
    let (server, serving) = server(folder.path(), true, answer);
    let error = server.read_at(&mut [0; 10], 100).unwrap_err();
    drop(server);
    serving.join().unwrap();
    error
}

#[test]
fn bytes_are_those_of_the_file_whatever_the_replies_look_like() {
    let simple: Answer = |request| {
        let mut writer = Writer::new();
        ServerEvent::Simple { error: 0, cookie: request.cookie }.encode(&mut writer);
        (request.offset..request.offset + u64::from(request.len)).for_each(|at| {
            writer.u8(byte(at));
        });
        writer.into_bytes()
    };
    let structured: Answer = |request| {
        let Request { offset, len, .. } = *request;
        let half = Content::Data { offset, len: len / 2 };
        let rest = Content::Data { offset: offset + u64::from(len / 2), len: len - len / 2 };
        [chunk(request, false, half), chunk(request, false, rest), chunk(request, true, Content::None)].concat()
    };
    for (in_chunks, answer) in [(false, simple), (true, structured)] {
        let folder = tempfile::tempdir().unwrap();
        let (server, serving) = server(folder.path(), in_chunks, answer);
        assert_eq!(server.len().unwrap(), LEN);
        thread::scope(|scope| {
            for start in 0..4 {
                let server = &server;
                scope.spawn(move || {
                    for at in (start * 1000..LEN - 5000).step_by(40_000) {
                        let mut bytes = vec![0; 5000];
                        server.read_at(&mut bytes, at).unwrap();
                        assert!(bytes.iter().zip(at..).all(|(found, at)| *found == byte(at)), "{at}");
                    }
                });
            }
        });
        let behind = server.read_at(&mut [0; 2], LEN - 1).unwrap_err();
        assert_eq!(behind.kind(), ErrorKind::UnexpectedEof);
        drop(server);
        serving.join().unwrap();
    }
}

#[test]
fn a_stream_goes_on_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (server, serving) = server(folder.path(), true, |request| {
        let Request { offset, len, .. } = *request;
        match offset {
            200_000.. => chunk(request, true, Content::Hole { offset, len }),
            _ => chunk(request, true, Content::Data { offset, len }),
        }
    });
    let stream = ServedStream(Arc::new(server));
    let (mut first, mut second) = ([1; 3], vec![1; 200_000]);
    let read = stream.read(&mut [ReadSlice::bytes(&mut first), ReadSlice::bytes(&mut second)]).unwrap();
    assert_eq!((read, first), (STREAM_READ, [0, 1, 2].map(byte)));
    assert!(second[..read - 3].iter().zip(3..).all(|(found, at)| *found == byte(at)));
    stream.0.seek(LEN - 4);
    let read = stream.read(&mut [ReadSlice::bytes(&mut first), ReadSlice::bytes(&mut second[..9])]).unwrap();
    assert_eq!((read, first, &second[..2]), (4, [0; 3], &[0, byte(4)][..]));
    assert_eq!(stream.read(&mut [ReadSlice::bytes(&mut first)]).unwrap(), 0);
    drop(stream);
    serving.join().unwrap();
}

#[test]
fn what_a_server_cannot_read_it_says_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (server, serving) = server(folder.path(), true, |request| {
        let Request { offset, len, .. } = *request;
        let message = "guest: truncated at byte 7, in RAM block 'ram' › page 0x0\n".as_bytes();
        match offset {
            100 => chunk(request, true, Content::Error { error: 5, message, offset: None }),
            _ => chunk(request, true, Content::Data { offset, len }),
        }
    });
    let error = server.read_at(&mut [0; 10], 100).unwrap_err().to_string();
    assert_eq!(error, "the page server cannot read it: guest: truncated at byte 7, in RAM block 'ram' › page 0x0 ");
    let mut bytes = [0; 2];
    server.read_at(&mut bytes, 200).unwrap();
    assert_eq!(bytes, [byte(200), byte(201)]);
    drop(server);
    serving.join().unwrap();
}

#[test]
fn replies_that_leave_bytes_out_are_no_zeroes() {
    let missing = failure(|request| chunk(request, true, Content::Data { offset: 100, len: 9 }));
    assert!(missing.to_string().contains("bytes are missing"), "{missing}");
    let gap = failure(|request| chunk(request, true, Content::Data { offset: 101, len: 9 }));
    assert!(gap.to_string().contains("order of chunks"), "{gap}");
    let foreign = failure(|request| {
        let other = Request { cookie: request.cookie + 1, ..*request };
        chunk(&other, true, Content::Data { offset: 100, len: 10 })
    });
    assert!(foreign.to_string().contains("a reply to request"), "{foreign}");
    let beyond = failure(|request| chunk(request, true, Content::Hole { offset: 100, len: 11 }));
    assert!(beyond.to_string().contains("expected some of 0x64 to 0x6e"), "{beyond}");
    let garbage = failure(|_| vec![0x55; 64]);
    assert_eq!(garbage.kind(), ErrorKind::InvalidData);
}

/// Another server at the same address may have another file.
#[test]
fn a_server_that_has_gone_is_not_connected_to_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let server = PageServer::new(Address::Unix(path.clone()), String::new());
    let nobody = server.read_at(&mut [0; 2], 0).unwrap_err();
    assert!(nobody.to_string().contains("socket"), "{nobody}");
    static ASKED: AtomicBool = AtomicBool::new(false);
    let cut: Answer = |request| {
        ASKED.store(true, Ordering::Relaxed);
        chunk(request, true, Content::Data { offset: request.offset, len: 10 })[..25].to_vec()
    };
    let listener = UnixListener::bind(&path).unwrap();
    let serving = thread::spawn(move || {
        let streams = (0..CONNECTIONS).map(|_| {
            let stream = listener.accept().unwrap().0;
            let session_of = stream.try_clone().unwrap();
            drop(thread::spawn(move || session(session_of, true, cut)));
            stream
        });
        streams.collect::<Vec<_>>()
    });
    let reading = thread::spawn(move || {
        let error = server.read_at(&mut [0; 10], 100).unwrap_err();
        (server, error)
    });
    let streams = serving.join().unwrap();
    while !ASKED.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(1));
    }
    streams.iter().for_each(|stream| stream.shutdown(std::net::Shutdown::Both).unwrap());
    let (server, error) = reading.join().unwrap();
    assert!(error.to_string().contains("page server"), "{error}");
    std::fs::remove_file(&path).unwrap();
    let whole =
        serve(&path, 1, true, |request| chunk(request, true, Content::Data { offset: request.offset, len: 10 }));
    assert_eq!(server.read_at(&mut [0; 10], 100).unwrap_err().kind(), ErrorKind::NotConnected);
    drop(UnixStream::connect(&path).unwrap());
    whole.join().unwrap();
}
