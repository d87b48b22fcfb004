//! The benchmark measures what it says it measures, shown by a short run of it.

use std::error::Error;
use std::fs;
use std::process::Command;

use serde_json::Value;
use vmm_sys_util::tempdir::TempDir;

#[test]
fn a_short_run_fills_the_table() -> Result<(), Box<dyn Error>> {
    let folder = TempDir::new()?;
    let [json, page] = ["figures", "page"].map(|name| folder.as_path().join(name));
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--contenders", "ring,vublk-null", "--rounds", "1"])
        .args(["--seconds", "0.1", "--warm-up", "0.02", "--idle", "0.2"])
        .args(["--depths", "1,8", "--operation", "mixed", "--queues", "1,2"])
        .arg("--json")
        .arg(&json)
        .arg("--report")
        .arg(&page)
        .output()?;
    let said = String::from_utf8(output.stdout)?;
    let errors = String::from_utf8(output.stderr)?;
    assert!(output.status.success(), "{said}\n{errors}");

    let report: Value = serde_json::from_slice(&fs::read(&json)?)?;
    let cells = report["cells"].as_array().ok_or("no cells")?;
    // Two depths, two numbers of queues, two ways to wait; the spinning ring has one queue and is
    // polled only.
    assert_eq!(cells.len(), 8 + 2, "{report:#}");
    let page = fs::read_to_string(&page)?;
    assert!(page.contains("<svg"), "{page}");
    for cell in cells {
        let figure = |name: &str| cell[name]["median"].as_f64().unwrap_or(0.0);
        assert!(figure("ns") > 0.0 && figure("cpu_ns") > 0.0, "{cell:#}");
        let [p50, p99, p999] =
            ["p50", "p99", "p99.9"].map(|part| cell["latency_ns"][part].as_f64());
        assert!(Some(0.0) < p50 && p50 <= p99 && p99 <= p999, "{cell:#}");
        let contender = cell["contender"].as_str().ok_or("no name")?;
        assert!(
            said.contains(contender) && page.contains(contender),
            "{said}"
        );
        let memory = cell["peak_memory"].as_f64();
        assert_eq!(memory > Some(1e5), contender == "vublk-null", "{cell:#}");
    }
    let idle = report["idle"].as_array().ok_or("no daemons at rest")?;
    assert_eq!(idle.len(), 1, "{report:#}");
    assert!(idle[0]["memory"].as_u64() > Some(0), "{report:#}");
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_refused() -> Result<(), Box<dyn Error>> {
    for wrong in [
        ["--depths", "65"],
        ["--block-size", "1000"],
        ["--bars", "--instructions"],
        ["--contenders", "others"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_bench"))
            .args(wrong)
            .output()?;
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
    }
    Ok(())
}
