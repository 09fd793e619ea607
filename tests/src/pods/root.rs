//! A container's own file system, from inside its process before it becomes the container's program: this machine's files
//! under a layer of the container's own, without what is nobody's business there; volumes where the pod wants them.
//!
//! The layer is a tmpfs that is mounted in the container's mount namespace alone: it ends with it, and nothing of this
//! machine is ever written to.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

/// Of the machine's top directories a container sees these alone; the others are empty, and its own.
const SEEN: &[&str] = &["bin", "sbin", "usr", "lib", "lib32", "lib64", "libx32", "etc", "var", "opt"];

/// A directory or file of the machine's, and its place in the container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mount {
    pub source: PathBuf,
    pub target: PathBuf,
    pub read_only: bool,
}

/// What the file system is made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Root {
    /// An empty directory to work in.
    pub base: PathBuf,
    /// Of the container's own, such as `/etc/hosts`.
    pub files: Vec<(PathBuf, String)>,
    pub mounts: Vec<Mount>,
    pub read_only: bool,
    /// May change the kernel's settings (of its namespaces).
    pub privileged: bool,
}

impl Root {
    /// Makes it this process's; the process has a mount namespace and a process namespace of its own.
    pub fn enter(&self) -> Result<()> {
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
        mount(Some("tmpfs"), &self.base, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
            .context("mount the layer")?;
        let [upper, work, root] = ["upper", "work", "root"].map(|name| self.base.join(name));
        for dir in [&upper, &work, &root] {
            fs::create_dir(dir)?;
        }
        let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
        mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .context("mount the overlay")?;
        let mut hidden = Vec::new();
        for entry in fs::read_dir("/")?.flatten() {
            let name = entry.file_name();
            let seen = SEEN.iter().any(|seen| name.as_bytes() == seen.as_bytes());
            if !seen && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let mode = if name.as_bytes() == b"tmp" { "mode=1777" } else { "mode=0755" };
                mount(Some("tmpfs"), &root.join(&name), Some("tmpfs"), MsFlags::empty(), Some(mode))
                    .context("hide a directory")?;
                hidden.push(Path::new("/").join(name));
            }
        }
        let opened: Vec<(OwnedFd, &Mount)> =
            self.mounts.iter().map(|of| Ok((detached(&of.source)?, of))).collect::<Result<_>>()?;
        let devices = detached(Path::new("/dev"))?;
        // Sockets and devices of the network are looked up by /sys: the one of the container's network.
        std::env::set_current_dir(&root)?;
        nix::unistd::pivot_root(".", ".").context("change the root")?;
        umount2(".", MntFlags::MNT_DETACH).context("leave the old root")?;
        std::env::set_current_dir("/")?;
        attach(&devices, Path::new("/dev"))?;
        mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mount /proc")?;
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::MS_RDONLY, none).context("mount /sys")?;
        if !self.privileged {
            bind_read_only("/proc/sys")?;
        }
        fs::create_dir_all("/var/tmp")
            .and_then(|()| fs::set_permissions("/var/tmp", fs::Permissions::from_mode(0o1777)))?;
        for (path, content) in &self.files {
            let _ = fs::remove_file(path);
            fs::write(path, content).with_context(|| format!("write {}", path.display()))?;
        }
        let mut opened: Vec<_> = opened
            .into_iter()
            .map(|(source, place)| {
                let directory = Path::new(&format!("/proc/self/fd/{}", source.as_raw_fd())).is_dir();
                (source, place, directory)
            })
            .collect();
        // Outer ones first.
        opened.sort_by(|(_, a, _), (_, b, _)| a.target.cmp(&b.target));
        for (_, place, directory) in &opened {
            make_target(&place.target, *directory)?;
        }
        if self.read_only {
            let kernel = ["/dev", "/proc", "/sys"].map(Path::new);
            for path in hidden.iter().filter(|path| !kernel.contains(&path.as_path())) {
                read_only(path)?;
            }
            read_only(Path::new("/"))?;
        }
        for (source, place, directory) in &opened {
            if !place.target.exists() {
                // Inside another volume.
                make_target(&place.target, *directory)?;
            }
            attach(source, &place.target)?;
            if place.read_only {
                read_only(&place.target)?;
            }
        }
        Ok(())
    }
}

fn make_target(target: &Path, directory: bool) -> Result<()> {
    let made = if directory {
        fs::create_dir_all(target)
    } else {
        let parent = target.parent().map_or(Ok(()), fs::create_dir_all);
        parent.and_then(|()| if target.exists() { Ok(()) } else { fs::write(target, "") })
    };
    made.with_context(|| format!("make the mount point {}", target.display()))
}

fn bind_read_only(path: &str) -> Result<()> {
    let none: Option<&str> = None;
    mount(Some(path), path, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .with_context(|| format!("bind {path}"))?;
    read_only(Path::new(path))
}

fn read_only(path: &Path) -> Result<()> {
    let none: Option<&str> = None;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, path, none, flags, none).with_context(|| format!("make {} read-only", path.display()))
}

fn path_of(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// A mount of what is at `path`, nowhere yet: it can be put where `path` itself is no more.
fn detached(path: &Path) -> Result<OwnedFd> {
    let name = path_of(path)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: the kernel reads a string that outlives the call; what it returns is a new descriptor, ours alone.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, name.as_ptr(), flags) };
    if fd < 0 {
        bail!("open {}: {}", path.display(), std::io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(libc::c_int::try_from(fd)?) })
}

fn attach(source: &OwnedFd, target: &Path) -> Result<()> {
    let name = path_of(target)?;
    let from_descriptor: libc::c_uint = 4; // MOVE_MOUNT_F_EMPTY_PATH
    // SAFETY: the kernel reads two strings that outlive the call.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            source.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            name.as_ptr(),
            from_descriptor,
        )
    };
    if moved < 0 {
        bail!("mount {}: {}", target.display(), std::io::Error::last_os_error());
    }
    Ok(())
}
