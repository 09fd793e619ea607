//! Where an authority's key may lie, and what each place refuses.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is a test's failure

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rcgen::SubjectPublicKeyInfo;
use tombolo_identity::authority::csr::{self, ClusterCsr};
use tombolo_identity::authority::{AuthorityError, ClusterMaterial, Existing, Protection, RootAuthority};
use tombolo_identity::bundle::BundleSet;
use tombolo_identity::issuer::{KeyAndCsr, LEAF_LIFE, LeafIssuer};
use tombolo_identity::signer::command::CommandSigner;
use tombolo_identity::signer::file::{FileSigner, SecretKey};
use tombolo_identity::signer::{CaKey, Signer, SignerError};
use tombolo_identity::verify::{self, Usage};
use tombolo_identity::{SpiffeId, TrustDomain};

const NOW: Duration = Duration::from_secs(1_795_486_505);
const PASSPHRASE: &str = "korrekt Pferd Batterie";
const LIMIT: Duration = Duration::from_secs(20);

fn domain() -> TrustDomain {
    "acme.example".parse().unwrap()
}

fn init(dir: &Path, protection: Protection<'_>) -> RootAuthority {
    RootAuthority::init_with(dir, domain(), protection, NOW).unwrap()
}

fn name(text: &str) -> tombolo_model::names::ClusterName {
    text.parse().unwrap()
}

/// A leaf of this material verifies up to the root.
fn works(root: &RootAuthority, material: ClusterMaterial) {
    let bundles = BundleSet::of(root.bundle());
    let id = SpiffeId::gateway(&domain(), &material.cluster, "gw-1").unwrap();
    let issuer = LeafIssuer::new(material).unwrap();
    let leaf = issuer.issue(&KeyAndCsr::generate().unwrap().csr_der, &id, LEAF_LIFE, NOW).unwrap();
    verify::authenticate(&leaf.chain, &bundles, Usage::Client, verify::unix_time(NOW)).unwrap();
}

#[test]
fn an_encrypted_root_signs_only_after_its_passphrase_and_shows_everything_else_without() {
    let dir = tempfile::tempdir().unwrap();
    let made = init(dir.path(), Protection::Passphrase(PASSPHRASE));
    let stored = std::fs::read_to_string(dir.path().join("root.key")).unwrap();
    assert!(stored.contains("ENCRYPTED PRIVATE KEY"), "{stored}");
    let mut root = RootAuthority::load(dir.path()).unwrap();
    assert!(root.is_encrypted().unwrap() && root.fingerprint() == made.fingerprint());
    let locked = root.sign_cluster(&name("east"), Existing::Refuse, NOW).err().unwrap().to_string();
    assert!(locked.contains("root.key is encrypted") && locked.contains("--passphrase-file"), "{locked}");
    assert!(root.registry().is_empty(), "a name is not used up");
    for wrong in ["", "korrekt Pferd batterie"] {
        let refused = root.unlock(wrong).unwrap_err().to_string();
        assert!(refused.contains("the passphrase is wrong") && !refused.contains("Pferd"), "{refused}");
    }
    root.unlock(PASSPHRASE).unwrap();
    let material = root.sign_cluster(&name("east"), Existing::Refuse, NOW).unwrap();
    works(&root, material);
}

#[test]
fn a_passphrase_is_set_changed_and_taken_away_and_the_key_stays_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let root = init(dir.path(), Protection::Plain);
    let path = dir.path().join("root.key");
    let plain = std::fs::read_to_string(&path).unwrap();
    root.set_passphrase(None, Some("one")).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(root.set_passphrase(None, Some("two")).unwrap_err().to_string().contains("encrypted"));
    assert!(root.set_passphrase(Some("no"), Some("two")).unwrap_err().to_string().contains("wrong"));
    root.set_passphrase(Some("one"), Some("two")).unwrap();
    assert!(matches!(root.set_passphrase(Some("two"), Some("")), Err(AuthorityError::Key(_))));
    let mut again = RootAuthority::load(dir.path()).unwrap();
    again.unlock("two").unwrap();
    root.set_passphrase(Some("two"), None).unwrap();
    assert_eq!(key_of(&std::fs::read_to_string(&path).unwrap()), key_of(&plain));
}

fn key_of(pem: &str) -> Vec<u8> {
    let signer = FileSigner::from_pem(pem, Path::new("root.key")).unwrap();
    rcgen::PublicKeyData::subject_public_key_info(signer.public_key())
}

#[test]
fn openssl_opens_what_is_encrypted_here_and_the_other_way_round() {
    let dir = tempfile::tempdir().unwrap();
    let mut root = init(dir.path(), Protection::Passphrase(PASSPHRASE));
    let path = dir.path().join("root.key");
    let openssl = |args: &[&str]| {
        let output = Command::new("openssl").args(args).output().expect("openssl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let pass = format!("pass:{PASSPHRASE}");
    let file = path.to_str().unwrap();
    let public = openssl(&["pkey", "-in", file, "-passin", &pass, "-pubout"]);
    root.unlock(PASSPHRASE).unwrap();
    let plain = openssl(&["pkey", "-in", file, "-passin", &pass]);
    assert_eq!(
        key_of(&plain),
        rcgen::PublicKeyData::subject_public_key_info(&SubjectPublicKeyInfo::from_pem(&public).unwrap())
    );
    let plain_file = dir.path().join("plain");
    std::fs::write(&plain_file, plain).unwrap();
    let theirs =
        ["pkcs8", "-topk8", "-scrypt", "-in", plain_file.to_str().unwrap(), "-passout", "pass:other"];
    std::fs::write(&path, openssl(&theirs)).unwrap();
    root.unlock("other").unwrap();
}

#[test]
fn a_key_that_others_may_read_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut root = init(dir.path(), Protection::Plain);
    let out = dir.path().join("east");
    root.sign_cluster(&name("east"), Existing::Refuse, NOW).unwrap().save(&out).unwrap();
    let open =
        |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    for mode in [0o640, 0o604, 0o660] {
        open(&dir.path().join("root.key"), mode);
        open(&out.join("ca.key"), mode);
        let errors =
            [RootAuthority::load(dir.path()).err().unwrap(), ClusterMaterial::load(&out).err().unwrap()];
        for error in errors.map(|e| {
            format!("{e}: {}", std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default())
        }) {
            assert!(error.contains("chmod 600") && error.contains(&format!("{mode:04o}")), "{error}");
        }
    }
    open(&out.join("ca.key"), 0o400);
    ClusterMaterial::load(&out).unwrap();
}

#[test]
fn a_key_and_a_certificate_that_do_not_belong_together_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut root = init(&dir.path().join("a"), Protection::Plain);
    let _other = init(&dir.path().join("b"), Protection::Plain);
    std::fs::copy(dir.path().join("b/root.key"), dir.path().join("a/root.key")).unwrap();
    let error = RootAuthority::load(&dir.path().join("a")).err().unwrap().to_string();
    assert!(error.contains("root.key is not the one"), "{error}");
    for cluster in ["east", "west"] {
        let material = root.sign_cluster(&name(cluster), Existing::Refuse, NOW).unwrap();
        material.save(&dir.path().join(cluster)).unwrap();
    }
    std::fs::copy(dir.path().join("west/ca.key"), dir.path().join("east/ca.key")).unwrap();
    let error = ClusterMaterial::load(&dir.path().join("east")).err().unwrap().to_string();
    assert!(error.contains("ca.crt") && error.contains("another key than ca.key"), "{error}");
}

#[test]
fn a_clusters_key_stays_where_it_was_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut root = init(&dir.path().join("root"), Protection::Plain);
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    csr::make(&there, &name("east")).unwrap();
    let mode = std::fs::metadata(there.join("ca.key")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    let request = ClusterCsr::read(&there.join("ca.csr")).unwrap();
    assert_eq!(request.cluster, Some(name("east")));
    let signed = root.sign_csr(&name("east"), &request, Existing::Refuse, NOW).unwrap();
    signed.save(&back).unwrap();
    assert!(!back.join("ca.key").exists());
    for file in ["ca.crt", "bundle.json", "cluster.json"] {
        std::fs::copy(back.join(file), there.join(file)).unwrap();
    }
    works(&root, ClusterMaterial::load(&there).unwrap());
    // A replica with a key of its own, and the same request again, which keeps the key.
    csr::make(&there, &name("east")).unwrap();
    let again = ClusterCsr::read(&there.join("ca.csr")).unwrap();
    assert!(matches!(
        root.sign_csr(&name("east"), &again, Existing::Refuse, NOW).err().unwrap(),
        AuthorityError::Registered { .. }
    ));
    assert_eq!(root.sign_csr(&name("east"), &again, Existing::Renew, NOW).unwrap().tag, signed.tag);
    ClusterMaterial::load(&there).unwrap();
    // A request whose proof does not hold, or that is none.
    let text = std::fs::read_to_string(there.join("ca.csr")).unwrap();
    let middle = text.len() / 2;
    let changed = if text.as_bytes()[middle] == b'A' { "B" } else { "A" };
    for bad in [format!("{}{changed}{}", &text[..middle], &text[middle + 1..]), "hello".into()] {
        std::fs::write(there.join("bad.csr"), bad).unwrap();
        let error = ClusterCsr::read(&there.join("bad.csr")).err().unwrap().to_string();
        assert!(error.contains("bad.csr") && error.contains("trust csr"), "{error}");
    }
}

/// A program of this text.
fn program(dir: &Path, text: &str) -> String {
    let path = dir.join("signer");
    // Written by another process: one that this one has open for writing can't be executed.
    let script = format!("#!/bin/sh\nkey={}\n{text}\n", dir.join("hsm.pem").display());
    let staged = dir.join("staged");
    std::fs::write(&staged, script).unwrap();
    let status = Command::new("install").arg("-m0700").arg(&staged).arg(&path).status().unwrap();
    assert!(status.success());
    path.display().to_string()
}

const HONEST: &str = r#"case "$1" in
  public-key) openssl pkey -in $key -pubout ;;
  sign) test "$TOMBOLO_SIGNER_ALGORITHM" = ecdsa-p256-sha256 && openssl dgst -sha256 -sign $key ;;
esac"#;

fn hsm(dir: &Path) {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    std::fs::write(dir.join("hsm.pem"), key.serialize_pem()).unwrap();
}

#[test]
fn a_root_behind_a_program_leaves_no_key_in_its_directory_and_signs() {
    let dir = tempfile::tempdir().unwrap();
    hsm(dir.path());
    let root_dir = dir.path().join("root");
    let base64 = HONEST.replace("-sign $key", "-sign $key | base64");
    for (program, existing) in [(HONEST, Existing::Refuse), (base64.as_str(), Existing::Renew)] {
        let command = self::program(dir.path(), program);
        let open = || Box::new(CommandSigner::open(&command, LIMIT).unwrap());
        if existing == Existing::Refuse {
            init(&root_dir, Protection::Signer(open()));
        }
        assert!(!root_dir.join("root.key").exists());
        let mut root = RootAuthority::load(&root_dir).unwrap();
        let error = root.sign_cluster(&name("east"), existing, NOW).err().unwrap().to_string();
        assert!(error.contains("--signer-command"), "{error}");
        root.attach(open()).unwrap();
        let material = root.sign_cluster(&name("east"), existing, NOW).unwrap();
        works(&root, material);
    }
    hsm(dir.path());
    let command = program(dir.path(), HONEST);
    let other = RootAuthority::load(&root_dir)
        .unwrap()
        .attach(Box::new(CommandSigner::open(&command, LIMIT).unwrap()));
    assert!(other.unwrap_err().to_string().contains("not the one that the certificate is about"));
}

#[test]
fn a_program_that_fails_hangs_or_answers_nonsense_is_named_with_what_it_did() {
    let dir = tempfile::tempdir().unwrap();
    hsm(dir.path());
    let cases: &[(&str, &str, &str)] = &[
        ("no public key", "echo hello", "a public key in PEM was expected"),
        ("silence", "exit 0", "answered with nothing"),
        ("a failure", "echo 'slot 3 is empty' >&2; exit 7", "ended with exit status: 7: slot 3 is empty"),
        ("a flood", "head -c 10000000 /dev/zero", "65536 bytes of something else"),
        ("hangs", "sleep 30", "did not answer within"),
        (
            "another key's type",
            "openssl genpkey -algorithm ed25519 | openssl pkey -pubout",
            "neither ECDSA P-256 nor P-384",
        ),
    ];
    for (case, text, words) in cases {
        let command = program(dir.path(), text);
        let started = Instant::now();
        let limit = if *case == "hangs" { Duration::from_millis(300) } else { LIMIT };
        let error = CommandSigner::open(&command, limit).err().expect(case).to_string();
        assert!(error.contains(words) && error.contains("signer"), "{case}: {error}");
        assert!(started.elapsed() < LIMIT, "{case} took {:?}", started.elapsed());
    }
    let cases: &[(&str, &str)] = &[
        ("echo hello", "a signature that holds"),
        ("head -c 70 /dev/urandom", "a signature that holds"),
        ("openssl dgst -sha512 -sign $key", "a signature that holds"),
        ("echo no PIN >&2; exit 1", "no PIN"),
        ("kill -9 $$", "signal: 9"),
    ];
    for (text, words) in cases {
        let command = program(
            dir.path(),
            &format!("if [ $1 = public-key ]; then openssl pkey -in $key -pubout; else {text}; fi"),
        );
        let signer = CommandSigner::open(&command, LIMIT).unwrap();
        let error = signer.sign(b"message").unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("signer sign"), "{text}: {error}");
    }
    for nothing in ["", "/nonexistent/hsm"] {
        let error = CommandSigner::open(nothing, LIMIT).err().unwrap();
        assert!(matches!(error, SignerError::Start { .. }), "{error}");
    }
}

#[test]
fn no_private_key_is_ever_printed() {
    let dir = tempfile::tempdir().unwrap();
    hsm(dir.path());
    let path: PathBuf = dir.path().join("hsm.pem");
    let pem = std::fs::read_to_string(&path).unwrap();
    let secret = SecretKey::from_pem(&pem).unwrap();
    let raw = secret.serialize_der();
    let debug = format!("{secret:?}");
    let shown = format!("{debug} {:?}", CaKey::new(Box::new(FileSigner::new(secret).unwrap())));
    let errors = [
        FileSigner::from_pem(&pem.replace('A', "B"), &path)
            .err()
            .map(|e| format!("{e} {e:?}"))
            .unwrap_or_default(),
        FileSigner::from_pem(&pem[..100], &path).err().map(|e| format!("{e} {e:?}")).unwrap_or_default(),
    ];
    for text in [shown].iter().chain(&errors) {
        assert!(!pem.lines().any(|line| !line.starts_with("-----") && text.contains(line)), "{text}");
        assert!(!text.contains(&format!("{}, {}, {}", raw[36], raw[37], raw[38])), "{text}");
    }
}
