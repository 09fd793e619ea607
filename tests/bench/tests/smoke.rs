//! The benchmark itself runs: every kind of load through real HAProxy and through the terminating QUIC hops gives figures.

use std::process::Command;

use tombolo_tests::capability::require_programs;

#[test]
fn a_short_run_measures_every_row_without_errors_and_leaves_no_process() {
    let test = "a_short_run_measures_every_row_without_errors_and_leaves_no_process";
    let Some(()) = require_programs(test, &["haproxy", "nginx"]) else { return };
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("report.json");
    let output = Command::new(env!("CARGO_BIN_EXE_tombolo-bench"))
        .args([
            "run",
            "--quick",
            "--only",
            "local,req32,mixed32,conn16,bulk8,direct,haproxy,quic-terminating",
        ])
        .args(["--json", json.to_str().unwrap(), "--keep", dir.path().join("work").to_str().unwrap()])
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    // Four rows on direct, haproxy, haproxy-resume and quic-terminating.
    assert_eq!(rows.len(), 16, "{text}");
    for row in rows {
        assert_eq!(row["failures"].as_array().unwrap().len(), 0, "{row:#}");
        let main = row["main_figure"].as_str().unwrap();
        assert!(row["figures"][main]["median"].as_f64().unwrap() > 0.0, "{row:#}");
        assert_eq!(row["figures"]["errors"]["max"].as_f64(), Some(0.0), "{row:#}");
    }
    // Every process had its configuration in the kept directory: none of them may still run.
    let kept = dir.path().to_str().unwrap().to_owned();
    let alive: Vec<String> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read_to_string(entry.unwrap().path().join("cmdline")).ok())
        .filter(|command| command.contains(&kept))
        .collect();
    assert_eq!(alive, Vec::<String>::new());
}

#[test]
fn an_unknown_name_is_refused_before_anything_starts() {
    let output = Command::new(env!("CARGO_BIN_EXE_tombolo-bench"))
        .args(["run", "--only", "nonsense"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("nonsense") && text.contains("list"), "{text}");
}
