//! `qevm send` to `qevm receive` over TLS. Real QEMUs judge both in `qevm-conformance channels`.

use crate::receive::{LIMIT, receive};
use crate::sample::{Background, Ran, path, stream};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair};
use std::fs;
use std::path::Path;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// What one side has in its directory: the certificate of the authority, and one of its own that `signer` has signed.
fn side(directory: &Path, authority: &Authority, signer: &Authority, side: &str) -> String {
    let directory = directory.join(side);
    fs::create_dir_all(&directory).unwrap();
    let mut params = CertificateParams::new(vec!["there.example".to_owned()]).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "qevm");
    params.distinguished_name.push(DnType::CommonName, side);
    let key = KeyPair::generate().unwrap();
    fs::write(directory.join("ca-cert.pem"), authority.pem()).unwrap();
    fs::write(directory.join(format!("{side}-cert.pem")), params.signed_by(&key, signer).unwrap().pem()).unwrap();
    fs::write(directory.join(format!("{side}-key.pem")), key.serialize_pem()).unwrap();
    directory.display().to_string()
}

/// Sends a guest with two page channels: how both programs ended.
fn played(dir: &tempfile::TempDir, receiving: &[&str], sending: &[&str]) -> (Ran, Ran) {
    let mut options = vec!["--multifd-channels", "2"];
    options.extend(receiving);
    let receiver = receive(dir, &options);
    let guest = path("7.2-return-path.zst").display().to_string();
    let address = format!("unix:{}", dir.path().join("s").display());
    let mut arguments = vec!["send", "--multifd-channels", "2"];
    arguments.extend(sending);
    arguments.extend([guest.as_str(), address.as_str()]);
    loop {
        let sent = Background::start(&arguments).end(LIMIT);
        // The socket may not be there yet, or not listen.
        if !sent.stderr.contains("cannot connect") {
            return (receiver.end(LIMIT), sent);
        }
    }
}

#[test]
fn a_guest_goes_over_tls_with_its_page_channels() {
    let (dir, authority) = (tempfile::tempdir().unwrap(), authority());
    let [server, client] = ["server", "client"].map(|name| side(dir.path(), &authority, &authority, name));
    let receiving = ["--tls-creds", &server, "--tls-authz", "O=qevm,CN=client"];
    let sending = ["--tls-creds", &client, "--tls-hostname", "there.example"];
    let (received, sent) = played(&dir, &receiving, &sending);
    assert_eq!((received.code, sent.code), (Some(0), Some(0)), "{} {}", received.stderr, sent.stderr);
    assert_eq!(received.json()["handover"], "confirmed");
    // What arrived is what was sent: the RAM blocks and their digests.
    let original = crate::sample::file(&dir, "original", &stream("7.2-return-path")).display().to_string();
    let verified = crate::sample::qevm(["verify", "--json", &original]).json();
    assert!(verified["ram"].as_array().is_some_and(|blocks| !blocks.is_empty()), "{verified}");
    let digests = |report: &serde_json::Value| {
        let blocks = report["ram"].as_array().unwrap().clone();
        blocks.into_iter().map(|block| (block["name"].clone(), block["crc32"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(digests(&received.json()), digests(&verified));
}

#[test]
fn a_peer_that_is_not_trusted_is_named_and_nothing_arrives() {
    let (dir, authority, other) = (tempfile::tempdir().unwrap(), authority(), authority());
    let [server, client] = ["server", "client"].map(|name| side(dir.path(), &authority, &authority, name));
    let foreign = side(&dir.path().join("foreign"), &authority, &other, "client");
    let receiving = ["--timeout", "2", "--tls-creds", &server];
    let sending = ["--tls-creds", &client, "--tls-hostname", "there.example"];
    let elsewhere = ["--tls-creds", &client, "--tls-hostname", "elsewhere.example"];
    let stranger = ["--tls-creds", &foreign, "--tls-hostname", "there.example"];
    let denied = [&receiving[..], &["--tls-authz", "CN=somebody else"]].concat();
    let cases: [(&[&str], &[&str], &str, &str); 5] = [
        (&receiving, &elsewhere, "TLS session that was refused", "not valid for name"),
        (&receiving, &stranger, "TLS session that was refused", "TLS"),
        (&denied, &sending, "CN=client is denied", ""),
        (&receiving, &[], "without TLS (expected TLS (--tls-creds))", ""),
        (&receiving[..2], &sending, "a TLS ClientHello", "no TLS session"),
    ];
    for (receiving, sending, here, there) in cases {
        let (received, sent) = played(&dir, receiving, sending);
        assert_eq!((received.code, sent.code), (Some(1), Some(1)), "{} {}", received.stderr, sent.stderr);
        assert!(received.stderr.contains(here), "{here}: {}", received.stderr);
        assert!(sent.stderr.contains(there), "{there}: {}", sent.stderr);
        assert!(!dir.path().join("out").exists());
    }
}
