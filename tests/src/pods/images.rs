//! The images that the nodes have: each is a program of this machine.

use serde::{Deserialize, Serialize};

/// What a container of an image runs when its pod says nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    pub entrypoint: &'static [&'static str],
    pub command: &'static [&'static str],
    /// A program that is not on every container's path, and where the container has it.
    pub program: Option<(Program, &'static str)>,
}

/// A program whose place the node is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Program {
    Tombolo,
    CoreDns,
}

/// Does nothing until it is told to end; a shell as the first process would not hear SIGTERM.
const SLEEP: &[&str] = &["sh", "-c", "trap 'exit 0' TERM INT; sleep 2147483647 & wait"];
const NOTHING: &[&str] = &[];

/// `registry.example/team/tombolo:1.2@sha256:...` is `tombolo`. `None`: there is no such image here.
pub fn find(image: &str) -> Option<Image> {
    let path = image.split('@').next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let name = name.split(':').next().unwrap_or_default();
    let (entrypoint, command) = match name {
        "tombolo" => (&["tombolo"][..], NOTHING),
        "coredns" => (&["/coredns"][..], NOTHING),
        "socat" => (&["socat"][..], NOTHING),
        "curl" => (&["curl"][..], NOTHING),
        "nginx" => (NOTHING, &["nginx", "-g", "daemon off;"][..]),
        "python" => (NOTHING, &["python3"][..]),
        "netshoot" | "pause" => (NOTHING, SLEEP),
        "busybox" | "alpine" | "debian" => (NOTHING, &["sh"][..]),
        _ => return None,
    };
    let program = match name {
        "tombolo" => Some((Program::Tombolo, "/usr/local/bin/tombolo")),
        "coredns" => Some((Program::CoreDns, "/coredns")),
        _ => None,
    };
    Some(Image { entrypoint, command, program })
}

/// The command line: `command` takes the entrypoint's place, and then the image's own arguments are nobody's.
pub fn command_line(image: &Image, command: &[String], args: &[String]) -> Vec<String> {
    let own = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    match (command, args) {
        ([], []) => [own(image.entrypoint), own(image.command)].concat(),
        ([], args) => [own(image.entrypoint), args.to_vec()].concat(),
        (command, args) => [command, args].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_known_by_its_last_name_alone() {
        for image in
            ["tombolo", "tombolo:0.1.0", "reg:5000/a/tombolo@sha256:00", "reg:5000/tombolo:1@sha256:0"]
        {
            assert_eq!(find(image).unwrap().entrypoint, ["tombolo"], "{image}");
        }
        assert!(find("reg:5000/tombolo2").is_none());
        assert!(find("").is_none());
    }

    #[test]
    fn commands_replace_entrypoints_and_arguments_replace_arguments() {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let (socat, nginx) = (find("alpine/socat").unwrap(), find("nginx").unwrap());
        assert_eq!(command_line(&socat, &[], &words(&["-V"])), ["socat", "-V"]);
        assert_eq!(command_line(&socat, &words(&["sh"]), &words(&["-c", "x"])), ["sh", "-c", "x"]);
        assert_eq!(command_line(&socat, &words(&["sh"]), &[]), ["sh"]);
        assert_eq!(command_line(&nginx, &[], &[]), ["nginx", "-g", "daemon off;"]);
        assert_eq!(command_line(&nginx, &[], &words(&["true"])), ["true"]);
    }
}
