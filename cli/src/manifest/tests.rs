//! What a wrong manifest says.

use super::*;

const TWO: &str = "\
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: { name: web, namespace: shop }
---
apiVersion: tombolo.dev/v1alpha1
kind: FailoverPolicy
metadata: { name: web }
spec: { targetRef: { kind: ServiceImport, name: web }, tiers: [ { clusters: [ west ] } ] }
";

fn refused(text: &str) -> String {
    parse("web.yaml", text).unwrap_err().to_string()
}

#[test]
fn several_documents_keep_their_lines_and_get_the_default_namespace() {
    let manifests = parse("web.yaml", TWO).unwrap();
    let seen: Vec<_> =
        manifests.iter().map(|m| (m.kind(), m.namespace(), m.name(), m.place.as_str())).collect();
    assert_eq!(
        seen,
        [("ServiceExport", "shop", "web", "web.yaml:1"), ("FailoverPolicy", "default", "web", "web.yaml:5"),]
    );
}

#[test]
fn a_syntax_error_names_file_and_line() {
    let text = refused("apiVersion: v1\nkind: [ServiceExport\nmetadata: {}\n");
    assert!(text.contains("web.yaml:3") || text.contains("web.yaml:2"), "{text}");
}

#[test]
fn wrong_heads_name_the_field() {
    let cases = [
        ("kind: ServiceExport\nmetadata: {name: a}\n", "apiVersion is missing"),
        ("apiVersion: v1\nkind: 7\n", "field kind: a string is expected, not a number"),
        (
            "apiVersion: tombolo.dev/v1alpha1\nkind: FailoverPolcy\nmetadata: {name: a}\n",
            "did you mean FailoverPolicy",
        ),
        ("apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {}\n", "metadata.name"),
        (
            "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\nmetadata: {name: [a]}\n",
            "metadata.name",
        ),
        (
            "apiVersion: tombolo.dev/v1alpha1\nkind: FailoverPolicy\nmetadata: {name: a}\nspec: {targetRef: {kind: Service, name: a}, tires: []}\n",
            "spec.tires: is not a known field (did you mean tiers?)",
        ),
        ("- a\n- b\n", "not a list"),
        ("apiVersion: v1\nkind: List\nitems: 3\n", "field items"),
    ];
    for (yaml, expected) in cases {
        let text = refused(yaml);
        assert!(text.contains(expected) && text.contains("web.yaml:1"), "{yaml:?} gave {text}");
    }
}

#[test]
fn a_doubled_key_is_refused() {
    let text = refused("apiVersion: v1\nkind: ServiceExport\nkind: Workload\nmetadata: {name: a}\n");
    assert!(text.contains("web.yaml:3:1: duplicate mapping key: kind\n"), "{text}");
}

#[test]
fn an_object_over_a_mebibyte_is_refused_by_name() {
    let text = refused(&format!(
        "apiVersion: tombolo.dev/v1alpha1\nkind: Workload\nmetadata: {{name: big}}\nspec: {{note: {}}}\n",
        "x".repeat(MAX_OBJECT_BYTES)
    ));
    assert!(text.contains("Workload big") && text.contains("1048576"), "{}", &text[..200.min(text.len())]);
}

#[test]
fn a_huge_file_is_refused_by_its_size_without_reading_it() {
    let path = std::env::temp_dir().join(format!("tombolo-huge-{}.yaml", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(100_000_000).unwrap();
    let started = std::time::Instant::now();
    let text = read(std::slice::from_ref(&path)).unwrap_err().to_string();
    std::fs::remove_file(&path).unwrap();
    assert!(text.contains("100000000 bytes") && started.elapsed().as_millis() < 500, "{text}");
}

#[test]
fn a_billion_laughs_does_not_expand() {
    let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n");
    for level in 1..12 {
        let below = format!("*a{},", level - 1).repeat(10);
        bomb.push_str(&format!("a{level}: &a{level} [{below}]\n"));
    }
    assert!(parse("bomb.yaml", &bomb).is_err());
}

#[test]
fn a_directory_is_read_in_the_order_of_names_and_an_empty_one_is_an_error() {
    let dir = std::env::temp_dir().join(format!("tombolo-manifests-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    assert!(read(std::slice::from_ref(&dir)).unwrap_err().to_string().contains("no objects"));
    std::fs::write(dir.join("b.yaml"), TWO).unwrap();
    std::fs::write(
        dir.join("a.json"),
        r#"{"apiVersion":"tombolo.dev/v1alpha1","kind":"ClusterLink","metadata":{"name":"w"},"spec":{}}"#,
    )
    .unwrap();
    std::fs::write(dir.join("notes.txt"), "not a manifest").unwrap();
    let kinds: Vec<_> =
        read(std::slice::from_ref(&dir)).unwrap().iter().map(|m| m.kind().to_owned()).collect();
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(kinds, ["ClusterLink", "ServiceExport", "FailoverPolicy"]);
}
