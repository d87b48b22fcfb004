//! A measuring stick: fio on the file, as everybody knows it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::BenchError;
use super::load::{Progress, Shape};
use super::machine::Usage;

/// Runs fio for `time`; says what it did and what it used.
pub(super) fn run(
    path: &Path,
    shape: Shape,
    warm_up: Duration,
    time: Duration,
    cpu: usize,
) -> Result<(Progress, Usage), BenchError> {
    let failed = |what: String| BenchError::Fio { what };
    let operation = shape.operation.name();
    let output = Command::new("fio")
        .args([
            "--name=bench",
            "--ioengine=io_uring",
            "--direct=1",
            "--time_based",
            "--norandommap",
            "--randrepeat=0",
            "--output-format=json",
        ])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--rw=rand{operation}"))
        .arg(format!("--bs={}", shape.block))
        .arg(format!("--iodepth={}", shape.depth))
        .arg(format!("--ramp_time={}us", warm_up.as_micros()))
        .arg(format!("--runtime={}us", time.as_micros()))
        .arg(format!("--cpus_allowed={cpu}"))
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {said}", output.status)));
    }
    let report = serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()));
    parse(&report?, operation)
}

fn parse(report: &Value, operation: &str) -> Result<(Progress, Usage), BenchError> {
    let job = &report["jobs"][0];
    let number = |value: &Value, name: &str| {
        value[name].as_f64().ok_or_else(|| BenchError::Fio {
            what: format!("there is no {name} in its report"),
        })
    };
    let side = &job[operation];
    let requests = number(side, "total_ios")?;
    let elapsed = Duration::from_secs_f64(number(side, "runtime")? / 1e3);
    let busy = (number(job, "usr_cpu")? + number(job, "sys_cpu")?) / 100.0;
    let progress = Progress {
        requests: requests as u64,
        elapsed,
    };
    let usage = Usage {
        cpu: (busy * elapsed.as_nanos() as f64) as u64,
        sleeps: number(job, "ctx")? as u64,
    };
    Ok((progress, usage))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_is_understood() {
        let job = json!({
            "read": { "total_ios": 5000, "runtime": 250 },
            "usr_cpu": 10.0, "sys_cpu": 30.0, "ctx": 4000
        });
        let (progress, usage) = parse(&json!({ "jobs": [job] }), "read").unwrap();
        assert_eq!(progress.requests, 5000);
        assert_eq!(progress.elapsed, Duration::from_millis(250));
        assert_eq!(usage.cpu, 100_000_000);
        assert_eq!(usage.sleeps, 4000);
    }

    #[test]
    fn a_report_without_figures_is_refused() {
        assert!(parse(&json!({ "jobs": [] }), "read").is_err());
    }
}
