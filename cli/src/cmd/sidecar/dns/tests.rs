use super::*;

const BEFORE: &str = "search corp.example\nnameserver 192.0.2.1\n";

struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("resolv.conf"), BEFORE).unwrap();
        Self { dir }
    }
    fn path(&self) -> PathBuf {
        self.dir.path().join("resolv.conf")
    }
    fn text(&self) -> String {
        fs::read_to_string(self.path()).unwrap()
    }
    fn place(&self, dry_run: bool) -> Place {
        Place {
            dry_run,
            resolv_conf: self.path(),
            resolved_dir: self.dir.path().join("resolved.conf.d"),
            state_dir: self.dir.path().join("state"),
        }
    }
    fn install(&self, method: Method, resolver: &str, dry_run: bool) -> Result<Exit, Failure> {
        let place = self.place(dry_run);
        install(&InstallArgs { resolver: resolver.into(), method, search: Vec::new(), force: true, place })
    }
    fn remove(&self) {
        remove(&self.place(false)).unwrap();
    }
    fn is_remembered(&self) -> bool {
        self.dir.path().join("state").join(RECORD).exists()
    }
}

#[test]
fn what_was_there_is_put_back_however_often_it_was_installed() {
    let machine = Machine::new();
    machine.install(Method::ResolvConf, "127.0.0.54", true).unwrap();
    assert_eq!(machine.text(), BEFORE, "a dry run changes nothing");
    assert!(!machine.is_remembered());
    machine.install(Method::ResolvConf, "127.0.0.54", false).unwrap();
    let first = machine.text();
    assert!(first.contains("nameserver 127.0.0.54\nnameserver 192.0.2.1\n"), "{first}");
    machine.install(Method::ResolvConf, "127.0.0.54", false).unwrap();
    assert_eq!(machine.text(), first);
    machine.install(Method::ResolvConf, "127.0.0.55", false).unwrap();
    assert!(machine.text().contains("127.0.0.55") && !machine.text().contains("127.0.0.54"));
    machine.remove();
    assert_eq!(machine.text(), BEFORE);
    assert!(!machine.is_remembered());
    machine.remove();
    assert_eq!(machine.text(), BEFORE);
}

#[test]
fn a_link_becomes_one_again() {
    let machine = Machine::new();
    let target = machine.dir.path().join("stub.conf");
    fs::write(&target, BEFORE).unwrap();
    fs::remove_file(machine.path()).unwrap();
    symlink(&target, machine.path()).unwrap();
    machine.install(Method::ResolvConf, "127.0.0.54", false).unwrap();
    assert!(!fs::symlink_metadata(machine.path()).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&target).unwrap(), BEFORE, "what it leads to is somebody else's");
    machine.remove();
    assert_eq!(fs::read_link(machine.path()).unwrap(), target);
}

#[test]
fn what_somebody_else_has_written_since_stays() {
    let machine = Machine::new();
    machine.install(Method::ResolvConf, "127.0.0.54", false).unwrap();
    fs::write(machine.path(), machine.text() + "options edns0\n").unwrap();
    machine.remove();
    let text = machine.text();
    assert!(text.contains("options edns0") && text.contains("192.0.2.1") && !text.contains("127.0.0.54"));
    machine.install(Method::ResolvConf, "127.0.0.54", false).unwrap();
    fs::write(machine.path(), "nameserver 198.51.100.1\n").unwrap();
    machine.remove();
    assert_eq!(machine.text(), "nameserver 198.51.100.1\n");
    machine.install(Method::ResolvConf, "127.0.0.54", false).unwrap();
    fs::write(machine.path(), "nameserver 127.0.0.54\n").unwrap();
    machine.remove();
    assert_eq!(machine.text(), "nameserver 198.51.100.1\n", "never without a resolver");
}

#[test]
fn systemd_resolved_gets_a_drop_in_and_loses_it() {
    let machine = Machine::new();
    let drop_in = machine.dir.path().join("resolved.conf.d/tombolo.conf");
    machine.install(Method::Resolved, "127.0.0.1:7453", false).unwrap();
    assert!(fs::read_to_string(&drop_in).unwrap().contains("DNS=127.0.0.1:7453"));
    assert_eq!(machine.text(), BEFORE, "resolv.conf is not touched");
    let other = machine.install(Method::ResolvConf, "127.0.0.54", false).unwrap_err().to_string();
    assert!(other.contains("dns remove"), "{other}");
    machine.remove();
    assert!(!drop_in.exists());
}

#[test]
fn what_can_not_work_is_refused_before_anything_is_changed() {
    let machine = Machine::new();
    let cases = [
        (Method::ResolvConf, "127.0.0.1:7453", "only name port 53"),
        (Method::ResolvConf, "0.0.0.0", "can't be asked"),
        (Method::ResolvConf, "localhost", "no IP address"),
    ];
    for (method, resolver, expected) in cases {
        let refused = machine.install(method, resolver, false).unwrap_err().to_string();
        assert!(refused.contains(expected), "{resolver}: {refused}");
    }
    let place = machine.place(false);
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let resolver = silent.local_addr().unwrap().to_string();
    let args = InstallArgs { resolver, method: Method::Resolved, search: Vec::new(), force: false, place };
    let refused = install(&args).unwrap_err().to_string();
    assert!(refused.contains("serves no names") && refused.contains("nothing was changed"), "{refused}");
    assert_eq!(machine.text(), BEFORE);
    assert!(!machine.is_remembered());
}
