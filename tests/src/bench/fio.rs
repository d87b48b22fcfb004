//! A measuring stick: fio on the file, as everybody knows it.
//!
//! fio hands each request to the kernel by itself, where the other contenders hand over all that
//! came together. Storage that begins with the first of them at once is faster for it: on a virtual
//! disk, at depth 32, by a fifth, and the bare loop would be as fast as fio if it did the same.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::BenchError;
use super::case::{Case, Operation, READ_PERCENT};
use super::latency::Latency;
use super::load::Progress;
use super::machine::Usage;

/// What fio told of itself.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) progress: Progress,
    pub(super) usage: Usage,
    pub(super) latency: Latency,
}

/// Runs fio for `time`; its job has the requests of all queues in flight.
pub(super) fn run(
    path: &Path,
    case: &Case,
    warm_up: Duration,
    time: Duration,
    cpu: usize,
) -> Result<Told, BenchError> {
    let failed = |what: String| BenchError::Fio { what };
    let pattern = match case.operation {
        Operation::Read => "randread",
        Operation::Write => "randwrite",
        Operation::Mixed => "randrw",
    };
    let output = Command::new("fio")
        .args([
            "--name=bench",
            "--ioengine=io_uring",
            "--direct=1",
            "--time_based",
            "--norandommap",
            "--randrepeat=0",
            "--lat_percentiles=1",
            "--unified_rw_reporting=1",
            "--output-format=json",
        ])
        .arg(format!("--filename={}", path.display()))
        .arg(format!("--rw={pattern}"))
        .arg(format!("--rwmixread={READ_PERCENT}"))
        .arg(format!("--bs={}", case.block))
        .arg(format!("--iodepth={}", case.in_flight()))
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
    parse(&report?)
}

fn parse(report: &Value) -> Result<Told, BenchError> {
    let job = &report["jobs"][0];
    let number = |value: &Value, name: &str| {
        value[name].as_f64().ok_or_else(|| BenchError::Fio {
            what: format!("there is no {name} in its report"),
        })
    };
    // Reads and writes together, as they were asked for.
    let all = &job["mixed"];
    let requests = number(all, "total_ios")?;
    let elapsed = Duration::from_secs_f64(number(all, "runtime")? / 1e3);
    let busy = (number(job, "usr_cpu")? + number(job, "sys_cpu")?) / 100.0;
    let percentiles = &all["lat_ns"]["percentile"];
    Ok(Told {
        progress: Progress {
            requests: requests as u64,
            elapsed,
        },
        usage: Usage {
            cpu: (busy * elapsed.as_nanos() as f64) as u64,
            sleeps: number(job, "ctx")? as u64,
            // fio does not tell.
            waited: 0,
            preempted: 0,
        },
        latency: Latency {
            p50: number(percentiles, "50.000000")?,
            p99: number(percentiles, "99.000000")?,
            p999: number(percentiles, "99.900000")?,
        },
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_report_is_understood() {
        let job = json!({
            "mixed": { "total_ios": 5000, "runtime": 250, "lat_ns": { "percentile": {
                "50.000000": 10, "99.000000": 20, "99.900000": 30
            } } },
            "usr_cpu": 10.0, "sys_cpu": 30.0, "ctx": 4000
        });
        let Told {
            progress,
            usage,
            latency,
        } = parse(&json!({ "jobs": [job] })).unwrap();
        assert_eq!(progress.requests, 5000);
        assert_eq!(progress.elapsed, Duration::from_millis(250));
        assert_eq!(usage.cpu, 100_000_000);
        assert_eq!(usage.sleeps, 4000);
        assert_eq!((latency.p50, latency.p99, latency.p999), (10.0, 20.0, 30.0));
    }

    #[test]
    fn a_report_without_figures_is_refused() {
        assert!(parse(&json!({ "jobs": [] })).is_err());
    }
}
