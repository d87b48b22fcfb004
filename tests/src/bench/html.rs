//! The figures as a page that needs nothing but itself.

use std::fmt::{self, Display, Formatter};

use super::case::{Case, bytes};
use super::contender::{Contender, Disk};
use super::figures::{Cell, Spread};
use super::latency::Latency;
use super::plot::{Line, Plot, short};
use super::report::{Report, mebibytes, number};

/// The page of a report.
pub struct Page<'r>(pub &'r Report);

impl Display for Page<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let report = self.0;
        writeln!(
            f,
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>"
        )?;
        writeln!(
            f,
            "<meta name=\"viewport\" content=\"width=device-width\"/>"
        )?;
        writeln!(
            f,
            "<title>vublk: benchmark</title><style>{STYLE}</style></head><body>"
        )?;
        writeln!(f, "<h1>vublk: benchmark</h1>")?;
        let facts = report.host.facts.iter();
        let facts = facts.map(|(name, value)| vec![(*name).to_owned(), value.clone()]);
        table(f, &[], facts)?;
        for (contender, why) in &report.missing {
            let name = contender.name();
            writeln!(f, "<p>{name} is left out: {}.</p>", escaped(why))?;
        }
        verdicts(f, report)?;
        for disk in Disk::ALL {
            plots(f, report, disk)?;
        }
        instructions(f, report)?;
        idle(f, report)?;
        figures(f, report)?;
        writeln!(f, "</body></html>")
    }
}

fn verdicts(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    if report.verdicts.is_empty() {
        return Ok(());
    }
    writeln!(f, "<h2>Bars</h2>")?;
    let rows = report.verdicts.iter().map(|verdict| {
        let measured = verdict.measured.clone().unwrap_or_else(|| "-".into());
        let (name, word) = (verdict.name.into(), verdict.word().into());
        vec![name, verdict.wanted.clone(), measured, word]
    });
    table(f, &["bar", "wanted", "measured", "verdict"], rows)
}

/// Every plot of the contenders on this kind of device.
fn plots(f: &mut Formatter<'_>, report: &Report, disk: Disk) -> fmt::Result {
    let on_disk = |cell: &&Cell| cell.contender.about().disk == disk;
    let cells: Vec<_> = report.cells.iter().filter(on_disk).collect();
    if cells.is_empty() {
        return Ok(());
    }
    writeln!(f, "<h2>{}</h2>", disk.name())?;
    let by_depth: Axis = (
        "requests in flight on a queue",
        |case| case.depth.into(),
        |x| x.to_string(),
    );
    let by_block: Axis = ("length of a request, bytes", |case| case.block, bytes);
    // What is the same along an axis is the rest of the case.
    let at_any_depth = |case: &Case| Case { depth: 0, ..*case };
    let at_any_block = |case: &Case| Case { block: 0, ..*case };
    for group in groups(&cells, at_any_depth) {
        let case = group.first().map(|cell| cell.case);
        writeln!(f, "<h3>{}</h3><div>", case.map_or_else(String::new, title))?;
        for (name, unit, figure) in BY_DEPTH {
            let lines = lines(&group, by_depth.1, figure);
            plot(f, (name, unit), by_depth, lines)?;
        }
        writeln!(f, "</div>")?;
    }
    writeln!(f, "<h3>CPU time of the back end</h3><div>")?;
    for group in groups(&cells, at_any_block) {
        let lines = lines(&group, by_block.1, cpu);
        let case = group.first().map(|cell| cell.case);
        let name = case.map_or_else(String::new, |case| {
            format!(
                "{} {}, depth {}",
                case.waiting.name(),
                case.operation.name(),
                case.depth
            )
        });
        plot(f, (&name, "ns of CPU a request"), by_block, lines)?;
    }
    writeln!(f, "</div>")
}

/// The label, the figure and its text.
type Axis = (&'static str, fn(&Case) -> u64, fn(u64) -> String);
type Figure = fn(&Cell) -> Option<Spread>;

const BY_DEPTH: [(&str, &str, Figure); 4] = [
    ("throughput", "requests a second", |cell| {
        Some(cell.spread(|sample| 1e9 / sample.nanos))
    }),
    ("latency, p50", "us", |cell| {
        micros(cell, |latency| latency.p50)
    }),
    ("latency, p99", "us", |cell| {
        micros(cell, |latency| latency.p99)
    }),
    ("latency, p99.9", "us", |cell| {
        micros(cell, |latency| latency.p999)
    }),
];

fn micros(cell: &Cell, part: fn(&Latency) -> f64) -> Option<Spread> {
    let figures = cell
        .samples
        .iter()
        .filter_map(|sample| sample.latency.as_ref());
    let figures: Vec<_> = figures.map(|latency| part(latency) / 1e3).collect();
    (!figures.is_empty()).then(|| Spread::of(figures))
}

fn cpu(cell: &Cell) -> Option<Spread> {
    Some(cell.spread(|sample| sample.cpu))
}

/// Cells whose cases have the same key, in the order of their first ones.
fn groups<'c>(cells: &[&'c Cell], key: impl Fn(&Case) -> Case) -> Vec<Vec<&'c Cell>> {
    let mut groups: Vec<(Case, Vec<&Cell>)> = Vec::new();
    for &cell in cells {
        let key = key(&cell.case);
        match groups.iter_mut().find(|(other, _)| *other == key) {
            Some((_, group)) => group.push(cell),
            None => groups.push((key, vec![cell])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// A line for each contender.
fn lines(cells: &[&Cell], x: fn(&Case) -> u64, figure: Figure) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for cell in cells {
        let contender = cell.contender;
        let point = figure(cell).filter(|y| y.least > 0.0 && y.most.is_finite());
        let point = point.map(|y| (x(&cell.case), y));
        match lines.iter_mut().find(|line| line.name == contender.name()) {
            Some(line) => line.points.extend(point),
            None => lines.push(Line {
                name: contender.name(),
                colour: colour(contender),
                is_dashed: !contender.name().starts_with("vublk"),
                points: point.into_iter().collect(),
            }),
        }
    }
    for line in &mut lines {
        line.points.sort_unstable_by_key(|&(x, _)| x);
    }
    lines
}

fn plot(
    f: &mut Formatter<'_>,
    (title, y_label): (&str, &'static str),
    (x_label, _, x_text): Axis,
    lines: Vec<Line>,
) -> fmt::Result {
    let title = title.to_owned();
    let plot = Plot {
        title,
        x_label,
        y_label,
        x_text,
        lines,
    };
    plot.fmt(f)
}

/// A case without its depth.
fn title(case: Case) -> String {
    let whole = case.to_string();
    whole.replace(&format!(", depth {}", case.depth), "")
}

/// The same for the same program; all of them can be told apart on white and on black.
fn colour(contender: Contender) -> &'static str {
    match contender {
        Contender::VublkNull | Contender::VublkFile | Contender::VublkTmpfs => "#3b82f6",
        Contender::VublkPollNull | Contender::VublkPollFile => "#a855f7",
        Contender::VublkPinnedFile => "#14a08f",
        Contender::VublkThreads => "#e0479e",
        Contender::QsdNull | Contender::QsdFile | Contender::QsdTmpfs => "#ef7d1a",
        Contender::Ring | Contender::Uring => "#858b95",
        Contender::UringSpin => "#22a35a",
        Contender::UringSleep => "#a08c10",
        Contender::Fio => "#e5484d",
    }
}

fn instructions(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let Some(first) = report.instructions.first() else {
        return Ok(());
    };
    let depth = first.depth;
    writeln!(
        f,
        "<h2>Instructions of a request, null device, depth {depth}</h2>"
    )?;
    let rows = report.instructions.iter().map(|count| {
        let (name, more) = (count.setting.name().into(), count.more * 100.0);
        vec![name, format!("{:.1}", count.each), format!("{more:+.1} %")]
    });
    table(f, &["setting", "instructions", "more than plain"], rows)
}

fn idle(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    if report.idle.is_empty() {
        return Ok(());
    }
    let seconds = report.options.idle.as_secs_f64();
    writeln!(f, "<h2>At rest for {seconds} s, front end connected</h2>")?;
    let rows = report.idle.iter().map(|idle| {
        let (cpu, memory) = (idle.cpu * 100.0, mebibytes(idle.memory as f64));
        let name = idle.contender.name().into();
        let (queues, wakeups) = (idle.queues.to_string(), format!("{:.2}", idle.wakeups));
        vec![
            name,
            queues,
            format!("{cpu:.3}"),
            wakeups,
            format!("{memory:.1}"),
        ]
    });
    let titles = ["", "queues", "CPU, %", "wake-ups/s", "own memory, MiB"];
    table(f, &titles, rows)
}

fn figures(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    if report.cells.is_empty() {
        return Ok(());
    }
    writeln!(f, "<h2>Figures</h2><p>{}</p>", escaped(&report.method()))?;
    let rows = report.cells.iter().map(|cell| {
        let nanos = cell.spread(|sample| sample.nanos);
        let part =
            |part: fn(&Latency) -> f64| number(micros(cell, part).map(|figure| figure.median), 1);
        vec![
            cell.case.to_string(),
            cell.contender.name().into(),
            format!("{:.0}", nanos.median),
            format!("{:.0}..{:.0}", nanos.least, nanos.most),
            short(1e9 / nanos.median),
            format!("{:.0}", cell.spread(|sample| sample.cpu).median),
            format!("{:.3}", cell.spread(|sample| sample.sleeps).median),
            format!("{:.4}", cell.spread(|sample| sample.preempted).median),
            format!("{:.1}", cell.spread(|sample| sample.waited).median * 100.0),
            number(cell.median(|sample| sample.syscalls), 3),
            part(|latency| latency.p50),
            part(|latency| latency.p99),
            part(|latency| latency.p999),
            number(cell.median(|sample| sample.memory).map(mebibytes), 1),
        ]
    });
    table(f, &FIGURES, rows)
}

fn table(
    f: &mut Formatter<'_>,
    titles: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> fmt::Result {
    writeln!(f, "<table>")?;
    if !titles.is_empty() {
        let titles: Vec<_> = titles
            .iter()
            .map(|title| format!("<th>{title}</th>"))
            .collect();
        writeln!(f, "<tr>{}</tr>", titles.concat())?;
    }
    for row in rows {
        let class = row.last().map_or("", String::as_str).replace(' ', "-");
        let class = escaped(&class);
        let cells = row.iter().map(|cell| format!("<td>{}</td>", escaped(cell)));
        writeln!(
            f,
            "<tr class=\"{class}\">{}</tr>",
            cells.collect::<String>()
        )?;
    }
    writeln!(f, "</table>")
}

fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('"', "&quot;");
    text.replace('<', "&lt;").replace('>', "&gt;")
}

const FIGURES: [&str; 14] = [
    "case",
    "contender",
    "ns/request",
    "least..most",
    "requests/s",
    "CPU ns/request",
    "sleeps/request",
    "preempted/request",
    "waited for a CPU, %",
    "system calls/request",
    "p50, us",
    "p99, us",
    "p99.9, us",
    "peak own memory, MiB",
];

const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --back: #fff; --text: #1c1f24; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --text: #dde1e7; } }
body { background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif;
  max-width: 1500px; margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { font-weight: 600; } h2 { margin-top: 2em; border-bottom: 1px solid var(--line); }
div { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 1em; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .5em; }
svg { width: 100%; height: auto; } svg line { stroke: var(--line); }
svg text { fill: var(--text); font-size: 13px; } svg .title { font-size: 15px; font-weight: 600; }
figcaption { font-size: 13px; display: flex; flex-wrap: wrap; gap: .2em 1em; }
figcaption i { display: inline-block; width: 1.8em; vertical-align: middle; margin-right: .4em; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .15em .7em; text-align: right; }
td { white-space: nowrap; } th { vertical-align: bottom; }
td:first-child, th:first-child, td:nth-child(2):last-child { text-align: left; }
.met td:last-child { color: #22a35a; } .missed td:last-child { color: #e5484d; }
";

#[cfg(test)]
mod tests {
    use super::super::report::tests::filled;
    use super::*;

    /// Panics unless every element that begins also ends, in the right order.
    fn check_elements(page: &str) {
        let mut open = Vec::new();
        for tag in page.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').unwrap();
            let name = tag.split([' ', '\n']).next().unwrap();
            if let Some(name) = name.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "</{name}>");
            } else if !tag.ends_with('/') && !tag.starts_with('!') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn the_page_is_whole_and_has_every_contender() {
        let mut report = filled("--depths 1,8,32 --block-size 4K,64K --waiting polling");
        report.missing = vec![(Contender::QsdTmpfs, "a < b & c".into())];
        let page = Page(&report).to_string();
        check_elements(&page);
        assert!(page.contains("a &lt; b &amp; c"));
        assert!(!page.contains("NaN"), "{page}");
        for contender in &report.options.contenders {
            let name = contender.name();
            assert!(page.contains(&format!("</i>{name}</span>")), "{name}");
            assert!(page.contains(&format!("<td>{name}</td>")), "{name}");
        }
        // Two kinds of devices, two lengths, four plots by depth; three depths, one plot each.
        assert_eq!(page.matches("<svg").count(), 2 * (2 * 4 + 3));
    }
}
