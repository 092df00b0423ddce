use super::*;
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;

/// A directory with certificates for both sides.
fn certificates() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
    write("ca-cert.pem", authority.pem());
    for side in ["client", "server"] {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        write(&format!("{side}-cert.pem"), params.signed_by(&key, &authority).unwrap().pem());
        write(&format!("{side}-key.pem"), key.serialize_pem());
    }
    directory
}

fn add(objects: &Objects, properties: Value) -> Result<(), String> {
    let Value::Object(properties) = properties else { panic!() };
    objects.add(properties).map_err(|error| error.to_string())
}

/// The texts are those of QEMU 11.1.
#[test]
fn objects_are_made_and_refused_as_by_a_qemu() {
    let directory = certificates();
    let dir = directory.path().to_str().unwrap();
    let objects = Objects::default();
    let x509 = |more: Value| {
        let mut all = json!({ "qom-type": "tls-creds-x509", "id": "t", "dir": dir, "endpoint": "client" });
        let Value::Object(more) = more else { panic!() };
        more.into_iter().for_each(|(name, value)| all[name.as_str()] = value);
        all
    };
    for (properties, why) in [
        (json!({ "id": "t" }), "Parameter 'qom-type' is missing"),
        (json!({ "qom-type": "tls-creds-foo" }), "Parameter 'qom-type' does not accept value 'tls-creds-foo'"),
        (json!({ "qom-type": "tls-creds-x509" }), "Parameter 'id' is missing"),
        (json!({ "qom-type": "tls-creds-x509", "id": "t" }), "Missing 'dir' property value"),
        (x509(json!({ "endpoint": "clown" })), "Parameter 'endpoint' does not accept value 'clown'"),
        (x509(json!({ "dir": 5 })), "Invalid parameter type for 'dir', expected: string"),
        (x509(json!({ "foo": 1 })), "Parameter 'foo' is unexpected"),
        (x509(json!({ "verify-peer": "off" })), "Invalid parameter type for 'verify-peer', expected: boolean"),
        (
            x509(json!({ "dir": "/nonexistent" })),
            "Unable to access credentials /nonexistent/ca-cert.pem: No such file or directory",
        ),
        (json!({ "qom-type": "authz-simple", "id": "t" }), "Parameter 'identity' is missing"),
        (
            json!({ "qom-type": "authz-list", "id": "t", "rules": [{ "match": "CN=x", "policy": "allo" }] }),
            "Parameter 'policy' does not accept value 'allo'",
        ),
    ] {
        let refused = add(&objects, properties.clone()).unwrap_err();
        assert_eq!(refused, why, "{properties}");
    }
    let refused = add(&objects, x509(json!({ "priority": "NORMAL:-AES-128-GCM" }))).unwrap_err();
    assert!(refused.contains("'priority': 'NORMAL:-AES-128-GCM' is not supported here"), "{refused}");
    add(&objects, x509(json!({ "priority": "NORMAL:-VERS-TLS1.3" }))).unwrap();
    let again = add(&objects, x509(json!({}))).unwrap_err();
    assert_eq!(again, "attempt to add duplicate property 't' to object (type 'container')");
    objects.delete("t").unwrap();
    assert_eq!(objects.delete("t").unwrap_err().to_string(), "object 't' not found");
}

/// The texts are those of QEMU 11.1.
#[test]
fn parameters_name_credentials_of_their_side() {
    let directory = certificates();
    let dir = directory.path().to_str().unwrap();
    let objects = Objects::default();
    for side in ["client", "server"] {
        let properties = json!({ "qom-type": "tls-creds-x509", "id": side, "dir": dir, "endpoint": side });
        add(&objects, properties).unwrap();
    }
    add(&objects, json!({ "qom-type": "authz-simple", "id": "a0", "identity": "CN=x" })).unwrap();
    let with = |creds: &str, authz: &str| {
        let mut parameters = Parameters::default();
        (parameters.tls_creds, parameters.tls_authz) = (creds.into(), authz.into());
        parameters
    };
    let refused = |parameters: &Parameters, side| objects.tls(parameters, side).unwrap_err().to_string();
    assert!(objects.tls(&with("", "a0"), Endpoint::Client).unwrap().is_none());
    assert_eq!(refused(&with("t0", ""), Endpoint::Client), "No TLS credentials with id 't0'");
    assert_eq!(refused(&with("a0", ""), Endpoint::Client), "Object with id 'a0' is not TLS credentials");
    assert_eq!(refused(&with("server", ""), Endpoint::Client), "Expected TLS credentials for a client endpoint");
    assert_eq!(refused(&with("client", ""), Endpoint::Server), "Expected TLS credentials for a server endpoint");
    assert_eq!(refused(&with("server", "a9"), Endpoint::Server), "No authorization object with id 'a9'");
    assert!(objects.tls(&with("client", "a9"), Endpoint::Client).unwrap().is_some(), "a source lets no client in");
    assert_eq!(objects.tls(&with("server", "a0"), Endpoint::Server).unwrap().unwrap().endpoint(), Endpoint::Server);
}

#[test]
fn the_first_rule_that_matches_decides() {
    let objects = Objects::default();
    let rules = json!([
        { "match": "CN=a", "policy": "deny" },
        { "match": "CN=*,O=qevm", "policy": "allow", "format": "glob" },
        { "match": "CN=?", "policy": "allow", "format": "exact" },
    ]);
    add(&objects, json!({ "qom-type": "authz-list", "id": "list", "rules": rules })).unwrap();
    let Some(Object::Authorization(list)) = objects.lock().get("list").cloned() else { panic!() };
    for (peer, allowed) in [("CN=a", false), ("CN=b", false), ("CN=?", true), ("CN=b,O=qevm", true), ("", false)] {
        assert_eq!(list.allows(peer), allowed, "{peer}");
    }
}
