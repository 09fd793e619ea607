//! The kinds an operator can name: canonical, plural and short, in kubectl's way, with suggestions for mistypes.

use crate::failure::Failure;

/// One kind and the names it answers to.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// As in `kind:` of a manifest.
    pub name: &'static str,
    pub plural: &'static str,
    pub short: &'static str,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
}

/// Every kind of this version.
pub const KINDS: &[Kind] = &[
    Kind { name: "Workload", plural: "workloads", short: "wl", namespaced: true },
    Kind { name: "ServiceExport", plural: "serviceexports", short: "svcex", namespaced: true },
    Kind { name: "ServiceImport", plural: "serviceimports", short: "svcim", namespaced: true },
    Kind { name: "FailoverPolicy", plural: "failoverpolicies", short: "fp", namespaced: true },
    Kind { name: "ClusterLink", plural: "clusterlinks", short: "cl", namespaced: false },
    Kind { name: "ClusterProperty", plural: "clusterproperties", short: "cp", namespaced: false },
];

/// Finds a kind by any of its names, in any case.
pub fn parse(text: &str) -> Result<&'static Kind, Failure> {
    // `serviceimports.multicluster.x-k8s.io` names the group too, as kubectl allows.
    let lower = text.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let found = KINDS
        .iter()
        .find(|kind| lower == kind.name.to_ascii_lowercase() || lower == kind.plural || lower == kind.short);
    found.ok_or_else(|| {
        let known: Vec<_> = KINDS.iter().map(|kind| kind.plural).collect();
        let failure = Failure::usage(format_args!("unknown kind {text:?}"));
        match closest(&lower, KINDS.iter().flat_map(|kind| [kind.plural, kind.short])) {
            Some(near) => failure.remedy(format_args!("did you mean {near:?}? Kinds: {}", known.join(", "))),
            None => failure.remedy(format_args!("kinds are: {}", known.join(", "))),
        }
    })
}

/// The kind of a manifest, spelled exactly as `kind:` must be.
pub fn exact(text: &str) -> Result<&'static Kind, String> {
    KINDS.iter().find(|kind| kind.name == text).ok_or_else(|| {
        let known: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
        let shortened: String = text.chars().take(80).collect();
        match closest(&text.to_ascii_lowercase(), KINDS.iter().map(|kind| kind.name)) {
            Some(near) => format!("kind {shortened:?} is unknown: did you mean {near}?"),
            None => format!("kind {shortened:?} is unknown: one of {}", known.join(", ")),
        }
    })
}

/// The nearest of the known words, if it is near enough to be what was meant.
pub fn closest<'a>(typed: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Comparing is quadratic in length: nobody mistypes a kind in a thousand letters.
    if typed.len() > 64 {
        return None;
    }
    known
        .map(|word| (strsim::jaro_winkler(typed, &word.to_ascii_lowercase()), word))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, word)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_answers_to_all_its_names() {
        for name in [
            "ServiceImport",
            "serviceimport",
            "serviceimports",
            "svcim",
            "serviceimports.multicluster.x-k8s.io",
        ] {
            assert_eq!(parse(name).unwrap().name, "ServiceImport", "{name}");
        }
    }

    #[test]
    fn a_mistyped_kind_gets_a_suggestion() {
        assert!(parse("serviceimprots").unwrap_err().to_string().contains("\"serviceimports\""));
        assert!(exact("FailoverPolcy").unwrap_err().contains("did you mean FailoverPolicy"));
        assert!(exact(&"x".repeat(100_000)).unwrap_err().len() < 400);
    }

    #[test]
    fn names_are_unambiguous() {
        let mut all: Vec<_> = KINDS.iter().flat_map(|kind| [kind.plural, kind.short]).collect();
        all.sort_unstable();
        let count = all.len();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
