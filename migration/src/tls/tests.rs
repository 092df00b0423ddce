use super::*;
use crate::arrivals::{Seen, gather};
use crate::channel::{read_at_least, write_all};
use crate::multifd::Settings;
use crate::patience::Patience;
use crate::unidentified::{Dropped, Reason};
use crate::{Capabilities, Channel, Job, Listener, Outgoing, ReadSlice, Socket, WriteSlice};
use qevm_savevm::first_bytes::FirstBytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const MAIN: &[u8] = b"QEVM\0\0\0\x03\x07";

/// An authority, and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes `NAME-cert.pem` and `NAME-key.pem`, changed by `change`, beside the authority's own.
    fn sign(&self, directory: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CountryName, "DE");
        params.distinguished_name.push(DnType::OrganizationName, "qevm");
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::write(directory.join("ca-cert.pem"), self.0.pem()).unwrap();
        fs::write(directory.join(format!("{name}-cert.pem")), certificate.pem()).unwrap();
        fs::write(directory.join(format!("{name}-key.pem")), key.serialize_pem()).unwrap();
    }

    /// A directory with everything that both sides need.
    fn directory(&self) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        ["server", "client"].into_iter().for_each(|name| self.sign(directory.path(), name, |_| {}));
        directory
    }
}

fn tls(directory: &Path, endpoint: Endpoint, versions: Versions) -> Tls {
    Tls::new(Arc::new(Credentials::x509(directory, endpoint, true, versions).unwrap()))
}

const ONLY_12: Versions = Versions { tls12: true, tls13: false };
const ONLY_13: Versions = Versions { tls12: false, tls13: true };

/// Waits as a destination, and calls it with `call`: what it was told, and what came of the call.
fn wait<T>(
    server: Tls,
    channels: Option<u8>,
    call: impl FnOnce(u16, &mpsc::Receiver<Seen>) -> T,
) -> (crate::Incoming, Vec<Seen>, T) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let crate::Address::Tcp { port, .. } = *listener.address() else { panic!() };
    let (sender, seen) = mpsc::channel();
    let waiting = thread::spawn(move || {
        let settings = channels.map(|channels| {
            let job = Job::default();
            let (multifd, mut parameters) =
                (Capabilities::default().with([("multifd", true)]).unwrap(), job.parameters());
            parameters.multifd_channels = channels;
            let profile = qevm_wire::Profile::new(qevm_wire::QemuVersion { major: 11, minor: 1 }, "microvm");
            Settings::of(multifd, &parameters, &profile).unwrap()
        });
        let patience = Patience { silence: Some(LONG), channels: Some(LONG), watch: Arc::default() };
        gather(&listener, settings.as_ref(), false, Some(server), patience, &mut |seen| drop(sender.send(seen)))
            .unwrap()
    });
    let came = call(port, &seen);
    (waiting.join().unwrap(), seen.iter().collect(), came)
}

fn connect(port: u16, tls: Tls) -> Result<Outgoing, crate::MigrationError> {
    let job = Job::default();
    job.set_tls(Some(tls));
    Outgoing::open(&format!("tcp:127.0.0.1:{port}").parse().unwrap(), &job, &mut crate::NoDescriptors)
}

fn say(channel: &dyn Channel, bytes: &[u8]) {
    write_all(channel, &mut [WriteSlice::bytes(bytes)]).unwrap();
}

fn hear(channel: &dyn Channel, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let got = read_at_least(channel, &mut [ReadSlice::bytes(&mut bytes)], count).unwrap();
    bytes.truncate(got);
    bytes
}

fn reason(seen: &mpsc::Receiver<Seen>) -> Reason {
    match seen.recv_timeout(LONG).unwrap() {
        Seen::Dropped(Dropped { why, .. }) => why,
        Seen::Incomplete(error) => panic!("{error}"),
    }
}

#[test]
fn a_source_comes_in_a_session_of_each_version() {
    let directory = Authority::new().directory();
    for versions in [ONLY_12, ONLY_13, Versions::default()] {
        let server = tls(directory.path(), Endpoint::Server, versions);
        let (incoming, seen, outgoing) = wait(server, None, |port, _| {
            let outgoing = connect(port, tls(directory.path(), Endpoint::Client, Versions::default())).unwrap();
            say(&*outgoing.main, MAIN);
            outgoing
        });
        assert!(seen.is_empty(), "{seen:?}");
        assert_eq!(incoming.first, MAIN);
        say(&*incoming.main, b"answer");
        assert_eq!(hear(&*outgoing.main, 6), b"answer");
        outgoing.main.finish_writing();
        assert_eq!(hear(&*incoming.main, 1), b"");
    }
}

/// Both directions at once, in pieces of all sizes, and more than the connection holds.
#[test]
fn bytes_come_as_they_were_sent() {
    let directory = Authority::new().directory();
    for versions in [ONLY_12, ONLY_13] {
        let server = tls(directory.path(), Endpoint::Server, versions);
        let (incoming, _, outgoing) = wait(server, None, |port, _| {
            let outgoing = connect(port, tls(directory.path(), Endpoint::Client, versions)).unwrap();
            say(&*outgoing.main, MAIN);
            outgoing
        });
        let bytes: Vec<u8> = (0..5_000_000_u32).map(|number| (number.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
        let send = |channel: &dyn Channel, step: usize| {
            for piece in bytes.chunks(step) {
                let (a, b) = piece.split_at(piece.len() / 3);
                write_all(channel, &mut [WriteSlice::bytes(a), WriteSlice::bytes(b)]).unwrap();
            }
            channel.finish_writing();
        };
        let receive = |channel: &dyn Channel, step: usize| {
            let mut all: Vec<u8> = Vec::new();
            loop {
                let (mut a, mut b) = (vec![0; step], vec![0; step / 7 + 1]);
                let count = channel.read(&mut [ReadSlice::bytes(&mut a), ReadSlice::bytes(&mut b)]).unwrap();
                if count == 0 {
                    break all;
                }
                a.extend(b);
                all.extend(&a[..count]);
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| send(&*outgoing.main, 300_001));
            scope.spawn(|| send(&*incoming.main, 4099));
            let back = scope.spawn(|| receive(&*outgoing.main, 70_000));
            assert!(receive(&*incoming.main, 1000) == bytes);
            assert!(back.join().unwrap() == bytes);
        });
    }
}

#[test]
fn page_channels_have_sessions_of_their_own() {
    let directory = Authority::new().directory();
    let server = tls(directory.path(), Endpoint::Server, Versions::default());
    let (incoming, _, _open) = wait(server, Some(2), |port, _| {
        let client = || connect(port, tls(directory.path(), Endpoint::Client, Versions::default())).unwrap();
        let channels = [client(), client(), client()];
        for number in [1, 0] {
            let mut init = qevm_wire::Writer::new();
            qevm_multifd::Init::new(qevm_multifd::Uuid::default(), number).encode(&mut init);
            say(&*channels[usize::from(number)].main, init.as_bytes());
        }
        say(&*channels[2].main, MAIN);
        channels
    });
    assert_eq!((incoming.first.as_slice(), incoming.pages.len()), (MAIN, 2));
}

/// What a destination refuses, by the reason that it gives.
#[test]
fn a_connection_without_a_session_counts_for_nothing() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (directory, foreign) = (authority.directory(), other.directory());
    // The authority's own certificate is the right one, so that the client believes the server.
    fs::copy(directory.path().join("ca-cert.pem"), foreign.path().join("ca-cert.pem")).unwrap();
    let old = authority.directory();
    authority.sign(old.path(), "client", |params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    let bare = authority.directory();
    fs::remove_file(bare.path().join("client-cert.pem")).unwrap();
    for versions in [ONLY_12, ONLY_13] {
        let allowed = tls(directory.path(), Endpoint::Server, versions);
        let (_, rest, ()) = wait(allowed, None, |port, seen| {
            let plain = |bytes: &[u8]| TcpStream::connect(("127.0.0.1", port)).unwrap().write_all(bytes).unwrap();
            plain(b"QEVM\0\0\0\x03\x07");
            let why = reason(seen);
            assert!(matches!(&why, Reason::Tls(FirstBytes::File(_), TlsError::Handshake(_))), "{why:?}");
            plain(b"GET / HTTP/1.1\r\n\r\n");
            assert!(matches!(reason(seen), Reason::Tls(FirstBytes::Http, _)));
            for (directory, expected) in
                [(&foreign, "certificate"), (&old, "certificate expired"), (&bare, "peer sent no certificates")]
            {
                // The source learns it by an alert, at once or when it reads.
                let error = match connect(port, tls(directory.path(), Endpoint::Client, versions)) {
                    Err(error) => error.to_string(),
                    Ok(outgoing) => {
                        let read = outgoing.main.read(&mut [ReadSlice::bytes(&mut [0; 1])]);
                        read.unwrap_err().to_string()
                    }
                };
                assert!(error.contains("received fatal alert"), "{error}");
                let why = reason(seen);
                let Reason::Tls(FirstBytes::Tls, why) = why else { panic!("{why:?}") };
                assert!(why.to_string().contains(expected), "{why}");
            }
            let right = connect(port, tls(directory.path(), Endpoint::Client, versions)).unwrap();
            say(&*right.main, MAIN);
        });
        assert!(rest.is_empty(), "{rest:?}");
    }
}

#[test]
fn a_source_believes_only_the_host_that_it_called() {
    let (authority, other) = (Authority::new(), Authority::new());
    let directory = authority.directory();
    let elsewhere = authority.directory();
    authority.sign(elsewhere.path(), "server", |params| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("elsewhere.example".try_into().unwrap())];
    });
    let foreign = other.directory();
    let client = || tls(directory.path(), Endpoint::Client, Versions::default());
    let refuses = |port: u16, seen: &mpsc::Receiver<Seen>, tls: Tls, expected: &str| {
        let error = connect(port, tls).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        let why = reason(seen);
        assert!(matches!(&why, Reason::Tls(_, TlsError::Handshake(_)) | Reason::Closed(_)), "{why:?}");
    };
    let _ = wait(tls(elsewhere.path(), Endpoint::Server, Versions::default()), None, |port, seen| {
        refuses(port, seen, client(), "not valid for");
        let named = client().with_hostname("elsewhere.example").unwrap();
        say(&*connect(port, named).unwrap().main, MAIN);
    });
    let _ = wait(tls(directory.path(), Endpoint::Server, Versions::default()), None, |port, seen| {
        refuses(port, seen, tls(foreign.path(), Endpoint::Client, Versions::default()), "certificate");
        say(&*connect(port, client()).unwrap().main, MAIN);
    });
    // Where neither side checks the other, who they are does not matter.
    let trusting = |directory: &Path, endpoint| {
        Tls::new(Arc::new(Credentials::x509(directory, endpoint, false, Versions::default()).unwrap()))
    };
    let (_, seen, ()) = wait(trusting(directory.path(), Endpoint::Server), None, |port, _| {
        say(&*connect(port, trusting(foreign.path(), Endpoint::Client)).unwrap().main, MAIN);
    });
    assert!(seen.is_empty(), "{seen:?}");
    // A name that there is not is not checked.
    let (here, _there) = UnixStream::pair().unwrap();
    let error = TlsChannel::connect(Arc::new(Socket::Unix(here)), &client(), None).unwrap_err();
    assert!(error.to_string().contains("tls-hostname"), "{error}");
    assert!(matches!(client().with_hostname("no name").unwrap_err(), TlsError::Hostname(_)));
}

#[test]
fn the_operator_says_who_may_send_a_guest() {
    let directory = Authority::new().directory();
    let client = || tls(directory.path(), Endpoint::Client, Versions::default());
    let server = |name: &'static str| {
        tls(directory.path(), Endpoint::Server, Versions::default()).with_authorization(move |peer| peer == name)
    };
    let (incoming, seen, _open) = wait(server("C=DE,O=qevm,CN=client"), None, |port, _| {
        let outgoing = connect(port, client()).unwrap();
        say(&*outgoing.main, MAIN);
        outgoing
    });
    assert_eq!((incoming.first.as_slice(), seen.len()), (MAIN, 0));
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let crate::Address::Tcp { port, .. } = *listener.address() else { panic!() };
    let (sender, seen) = mpsc::channel();
    let others = server("CN=another");
    thread::spawn(move || {
        let patience = Patience { silence: Some(LONG), channels: Some(LONG), watch: Arc::default() };
        gather(&listener, None, false, Some(others), patience, &mut |seen| drop(sender.send(seen)))
    });
    let refused = connect(port, client());
    let why = reason(&seen);
    let Reason::Tls(_, error @ TlsError::Denied(_)) = why else { panic!("{why:?}") };
    assert_eq!(error.to_string(), "TLS x509 authz check for C=DE,O=qevm,CN=client is denied");
    // Whatever the source sends, it learns that the stream is not read.
    assert!(refused.is_err() || hear(&*refused.unwrap().main, 1).is_empty());
}

#[test]
fn credentials_that_cannot_be_used_are_named_by_their_file() {
    let authority = Authority::new();
    let load = |directory: &Path, endpoint| {
        Credentials::x509(directory, endpoint, true, Versions::default()).map(|_| ()).unwrap_err()
    };
    for (file, spoil) in [
        ("ca-cert.pem", None),
        ("ca-cert.pem", Some("no certificate")),
        ("server-cert.pem", None),
        ("server-cert.pem", Some("")),
        ("server-key.pem", None),
        ("server-key.pem", Some("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")),
        ("ca-crl.pem", Some("nothing")),
    ] {
        let directory = authority.directory();
        let path = directory.path().join(file);
        match spoil {
            None => fs::remove_file(&path).unwrap(),
            Some(text) => fs::write(&path, text).unwrap(),
        }
        let error = load(directory.path(), Endpoint::Server);
        let named = match &error {
            CredentialsError::Access { path, .. } if spoil.is_none() => path,
            CredentialsError::Content { path, .. } if spoil.is_some() => path,
            other => panic!("{file}: {other}"),
        };
        assert_eq!(*named, path);
        let text = error.to_string();
        assert!(text.contains(file), "{text}");
        let missing = format!("Unable to access credentials {}: No such file or directory", path.display());
        assert!(spoil.is_some() || text.starts_with(&missing), "{text}");
    }
    // A key of another certificate.
    let directory = authority.directory();
    fs::copy(directory.path().join("client-key.pem"), directory.path().join("server-key.pem")).unwrap();
    assert!(matches!(load(directory.path(), Endpoint::Server), CredentialsError::Use { .. }));
}

#[test]
fn credentials_are_for_one_side() {
    let directory = Authority::new().directory();
    let (here, _there) = UnixStream::pair().unwrap();
    let server = tls(directory.path(), Endpoint::Server, Versions::default());
    let error = TlsChannel::connect(Arc::new(Socket::Unix(here)), &server, Some("localhost")).unwrap_err();
    assert_eq!(error.to_string(), "Expected TLS credentials for a client endpoint");
    let error = Accepting::new(&tls(directory.path(), Endpoint::Client, Versions::default())).unwrap_err();
    assert_eq!(error.to_string(), "Expected TLS credentials for a server endpoint");
}
