//! The kinds an operator can name, in kubectl's way, with suggestions for mistypes. The kinds themselves are the model's.

use tombolo_model::resource::{KINDS, KindInfo, suggestion};

use crate::failure::Failure;

/// Finds a kind by any of its names, in any case.
pub fn parse(text: &str) -> Result<&'static KindInfo, Failure> {
    // `serviceimports.multicluster.x-k8s.io` names the group too, as kubectl allows.
    let name = text.split('.').next().unwrap_or_default();
    // Comparing for a suggestion is quadratic in length: nobody mistypes a kind in a thousand letters.
    let name: String = name.chars().take(64).collect();
    KindInfo::find(&name).ok_or_else(|| {
        let known: Vec<_> = KINDS.iter().map(|kind| kind.plural).collect();
        let failure = Failure::usage(format_args!("unknown kind {name:?}"));
        match suggestion(&name, known.iter().copied()) {
            Some(near) => failure.remedy(format_args!("did you mean {near}? Kinds: {}", known.join(", "))),
            None => failure.remedy(format_args!("kinds are: {}", known.join(", "))),
        }
    })
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
            assert_eq!(parse(name).unwrap().kind, "ServiceImport", "{name}");
        }
        for name in ["ap", "accesspolicy", "accesspolicies.tombolo.dev"] {
            assert_eq!(parse(name).unwrap().kind, "AccessPolicy", "{name}");
        }
    }

    #[test]
    fn a_mistyped_kind_gets_a_suggestion() {
        assert!(parse("serviceimprots").unwrap_err().to_string().contains("did you mean serviceimports?"));
        assert!(parse(&"x".repeat(100_000)).unwrap_err().to_string().len() < 400);
    }
}
