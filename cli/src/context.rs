//! Which federator an operator's command talks to: `--socket`, else `--context`, else the only one on this machine.

use std::path::{Path, PathBuf};

use tombolo_runtime::dirs::{self, Dirs};

use crate::args::Connect;
use crate::failure::Failure;

/// The admin socket to use.
pub fn socket(connect: &Connect) -> Result<PathBuf, Failure> {
    if let Some(socket) = &connect.socket {
        return Ok(socket.clone());
    }
    let dirs = Dirs::from_environment().map_err(Failure::new)?;
    let roots = [dirs.runtime.clone(), PathBuf::from(dirs::SYSTEM_RUNTIME)];
    match &connect.context {
        Some(cluster) => Ok(for_cluster(&roots, cluster)),
        None => only(find(&roots)),
    }
}

fn for_cluster(roots: &[PathBuf], cluster: &str) -> PathBuf {
    let candidates = || roots.iter().map(|root| dirs::admin_socket_in(root, cluster));
    candidates().find(|path| path.exists()).or_else(|| candidates().next()).unwrap_or_default()
}

/// Every admin socket below the given runtime directories.
fn find(roots: &[PathBuf]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = roots
        .iter()
        .filter_map(|root| std::fs::read_dir(root).ok())
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("admin.sock"))
        .filter(|path| path.exists())
        .collect();
    found.sort();
    found.dedup();
    found
}

fn only(found: Vec<PathBuf>) -> Result<PathBuf, Failure> {
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Failure::new("no federator is running on this machine (no admin socket found)").remedy(
            "start one with `tombolo federator --cluster NAME`, or name its socket with --socket PATH (TOMBOLO_SOCKET)",
        )),
        many => {
            let names: Vec<_> = many.iter().filter_map(|path| cluster_of(path)).collect();
            Err(Failure::usage(format_args!("several federators run on this machine: {}", names.join(", ")))
                .remedy(format_args!("choose one, for example --context {}", names.first().copied().unwrap_or("NAME"))))
        }
    }
}

fn cluster_of(socket: &Path) -> Option<&str> {
    socket.parent()?.file_name()?.to_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_federator_of_the_machine_needs_no_name() {
        assert_eq!(
            only(vec!["/run/tombolo/east/admin.sock".into()]).unwrap(),
            Path::new("/run/tombolo/east/admin.sock")
        );
    }

    #[test]
    fn several_federators_are_listed_with_the_flag_that_chooses() {
        let text =
            only(vec!["/r/east/admin.sock".into(), "/r/west/admin.sock".into()]).unwrap_err().to_string();
        assert!(text.contains("east, west") && text.contains("--context east"), "{text}");
    }

    #[test]
    fn no_federator_says_how_to_start_one() {
        assert!(only(Vec::new()).unwrap_err().to_string().contains("tombolo federator --cluster"));
    }

    #[test]
    fn sockets_are_found_below_the_runtime_directory() {
        let root = std::env::temp_dir().join(format!("tombolo-context-{}", std::process::id()));
        std::fs::create_dir_all(root.join("east")).unwrap();
        std::fs::write(root.join("east/admin.sock"), "").unwrap();
        let found = find(std::slice::from_ref(&root));
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(found, vec![root.join("east/admin.sock")]);
    }
}
