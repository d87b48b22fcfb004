//! fio in the guest.

use serde_json::Value;

use super::{Guest, GuestError};

const WHO: &str = "fio";

/// An fio run on a device of the guest, with O_DIRECT through libaio.
#[derive(Debug, Clone)]
pub struct Fio {
    options: Vec<String>,
}

impl Fio {
    /// A run on `device` (a path in the guest) with an access pattern: `randrw`, `read` and so on.
    #[must_use]
    pub fn new(device: &str, pattern: &str) -> Self {
        let options = [
            "--name=fio",
            "--direct=1",
            "--ioengine=libaio",
            "--group_reporting=0",
        ];
        Self {
            options: options.map(str::to_owned).into(),
        }
        .option("filename", device)
        .option("rw", pattern)
    }

    /// Adds `--name=value`.
    #[must_use]
    #[expect(
        clippy::needless_pass_by_value,
        reason = "numbers and names are written in place"
    )]
    pub fn option(mut self, name: &str, value: impl ToString) -> Self {
        self.options.push(format!("--{name}={}", value.to_string()));
        self
    }

    /// Checks every block read against the checksum written with it, and fails at the first that
    /// differs.
    #[must_use]
    pub fn verified(self) -> Self {
        self.option("verify", "crc32c").option("verify_fatal", 1)
    }

    /// The command line, for a run that is started in the background and never awaited.
    #[must_use]
    pub fn command(&self) -> String {
        format!("fio {}", self.options.join(" "))
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// `Command` when fio fails, `Garbled` when its report cannot be read.
    pub fn run(&self, guest: &mut Guest) -> Result<FioReport, GuestError> {
        let report = "/tmp/fio.json";
        guest.shell(&format!(
            "{} --output-format=json --output={report}",
            self.command()
        ))?;
        FioReport::parse(&guest.shell(&format!("cat {report}"))?)
    }
}

/// One direction of an fio report, summed over its jobs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Side {
    /// Requests completed.
    pub ios: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Requests a second.
    pub iops: f64,
    /// The mean latency, in microseconds.
    pub mean_us: f64,
}

/// What fio reports.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FioReport {
    /// The number of jobs.
    pub jobs: u64,
    /// Jobs that ended with an error: a failed request or a failed verification.
    pub errors: u64,
    /// The reads, those of a verification included.
    pub read: Side,
    /// The writes.
    pub write: Side,
}

impl FioReport {
    fn parse(text: &str) -> Result<Self, GuestError> {
        // fio writes its notes before the report.
        let start = text.find('{').unwrap_or_default();
        let json: Value = serde_json::from_str(text.get(start..).unwrap_or_default())
            .map_err(|error| garbled(format!("{error} in {text:?}")))?;
        let missing = || garbled(json.to_string());
        let mut report = Self::default();
        for job in json
            .get("jobs")
            .and_then(Value::as_array)
            .ok_or_else(missing)?
        {
            let job = JobReport::parse(job).ok_or_else(missing)?;
            report.jobs += 1;
            report.errors += u64::from(job.has_failed);
            report.read.add(job.read);
            report.write.add(job.write);
        }
        Ok(report)
    }
}

impl Side {
    fn parse(json: &Value) -> Option<Self> {
        Some(Self {
            ios: json.get("total_ios")?.as_u64()?,
            bytes: json.get("io_bytes")?.as_u64()?,
            iops: json.get("iops")?.as_f64()?,
            mean_us: json.get("lat_ns")?.get("mean")?.as_f64()? / 1000.0,
        })
    }

    fn add(&mut self, other: Self) {
        let all = self.ios + other.ios;
        if all > 0 {
            let weighted = self.mean_us * as_f64(self.ios) + other.mean_us * as_f64(other.ios);
            self.mean_us = weighted / as_f64(all);
        }
        self.ios = all;
        self.bytes += other.bytes;
        self.iops += other.iops;
    }
}

struct JobReport {
    has_failed: bool,
    read: Side,
    write: Side,
}

impl JobReport {
    fn parse(json: &Value) -> Option<Self> {
        Some(Self {
            has_failed: json.get("error")?.as_i64()? != 0,
            read: Side::parse(json.get("read")?)?,
            write: Side::parse(json.get("write")?)?,
        })
    }
}

fn garbled(what: String) -> GuestError {
    GuestError::Garbled { who: WHO, what }
}

#[expect(
    clippy::as_conversions,
    clippy::cast_precision_loss,
    reason = "counts far below 2^52"
)]
fn as_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(error: i64, ios: u64, mean_ns: u64) -> String {
        let side = format!(
            r#"{{"total_ios":{ios},"io_bytes":4096,"iops":2.5,"lat_ns":{{"mean":{mean_ns}.0}}}}"#
        );
        format!(r#"{{"error":{error},"read":{side},"write":{side}}}"#)
    }

    #[test]
    fn jobs_are_summed_after_fios_notes() {
        let jobs = [job(0, 1, 1000), job(5, 3, 5000)].join(",");
        let text = format!("note: something\n{{\"jobs\":[{jobs}]}}");
        let report = FioReport::parse(&text).unwrap();
        assert_eq!((report.jobs, report.errors), (2, 1));
        let read = Side {
            ios: 4,
            bytes: 8192,
            iops: 5.0,
            mean_us: 4.0,
        };
        assert_eq!(report.read, read);
    }

    #[test]
    fn a_torn_report_is_refused() {
        for text in ["", "{", r#"{"jobs":[{}]}"#, r#"{"jobs":3}"#] {
            assert!(FioReport::parse(text).is_err(), "{text}");
        }
    }
}
