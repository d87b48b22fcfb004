//! A plot as SVG: lines over powers of two, with a logarithmic scale on both axes.

use std::fmt::{self, Display, Formatter};

use super::figures::Spread;

/// A plot, with units in its labels.
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) x_label: &'static str,
    pub(super) y_label: &'static str,
    /// How a place on the x axis is written.
    pub(super) x_text: fn(u64) -> String,
    pub(super) lines: Vec<Line>,
}

/// One line of it.
pub(super) struct Line {
    pub(super) name: &'static str,
    /// Any of CSS's colours; it has to be seen on white and on black.
    pub(super) colour: &'static str,
    pub(super) is_dashed: bool,
    /// From left to right, all greater than zero; a figure that was measured often has ends.
    pub(super) points: Vec<(u64, Spread)>,
}

impl Plot {
    /// The figures that the axes have to hold; none when there are no points.
    fn bounds(&self) -> Option<Bounds> {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let mut xs: Vec<u64> = points().map(|&(x, _)| x).collect();
        xs.sort_unstable();
        xs.dedup();
        let least = points().fold(f64::INFINITY, |least, (_, y)| y.least.min(least));
        let most = points().fold(0.0, |most: f64, (_, y)| y.most.max(most));
        // A little air above and below, and an axis even for a single figure.
        (!xs.is_empty()).then(|| Bounds {
            xs,
            least: least / 1.3,
            most: most * 1.3,
        })
    }
}

struct Bounds {
    xs: Vec<u64>,
    least: f64,
    most: f64,
}

impl Bounds {
    fn x(&self, x: u64) -> f64 {
        let place = |x: u64| (x.max(1) as f64).log2();
        let (first, last) = match self.xs.as_slice() {
            [first, .., last] => (place(*first), place(*last)),
            // A single place stands in the middle.
            [..] => return f64::midpoint(LEFT, RIGHT),
        };
        LEFT + 14.0 + (place(x) - first) / (last - first) * (RIGHT - LEFT - 28.0)
    }

    fn y(&self, y: f64) -> f64 {
        let part = (y / self.least).ln() / (self.most / self.least).ln();
        BOTTOM - part * (BOTTOM - TOP)
    }

    /// Round figures on the y axis, more of every ten the fewer tens there are.
    fn ticks(&self) -> Vec<f64> {
        let decades = (self.most / self.least).log10();
        let steps: &[f64] = match decades {
            2.5.. => &[1.0],
            0.7.. => &[1.0, 2.0, 5.0],
            _ => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        };
        let exponents = self.least.log10().floor() as i32..=self.most.log10().ceil() as i32;
        let ticks = exponents
            .flat_map(|exponent| steps.iter().map(move |step| step * 10_f64.powi(exponent)));
        ticks
            .filter(|tick| (self.least..=self.most).contains(tick))
            .collect()
    }
}

impl Display for Plot {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let title = &self.title;
        writeln!(
            f,
            "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">"
        )?;
        let centre = f64::midpoint(LEFT, RIGHT);
        writeln!(f, "<title>{title}</title>")?;
        text(f, (centre, 16.0), "middle\" class=\"title", title)?;
        if let Some(bounds) = self.bounds() {
            self.axes(f, &bounds)?;
            for line in &self.lines {
                self.line(f, &bounds, line)?;
            }
        }
        writeln!(f, "</svg><figcaption>")?;
        for line in &self.lines {
            let Line { name, colour, .. } = line;
            let style = if line.is_dashed { "dashed" } else { "solid" };
            writeln!(
                f,
                "<span><i style=\"border-top:3px {style} {colour}\"></i>{name}</span>"
            )?;
        }
        writeln!(f, "</figcaption></figure>")
    }
}

impl Plot {
    fn axes(&self, f: &mut Formatter<'_>, bounds: &Bounds) -> fmt::Result {
        for tick in bounds.ticks() {
            let y = bounds.y(tick);
            rule(f, (LEFT, y), (RIGHT, y))?;
            text(f, (LEFT - 6.0, y + 4.0), "end", &short(tick))?;
        }
        for &x in &bounds.xs {
            let at = bounds.x(x);
            rule(f, (at, TOP), (at, BOTTOM))?;
            text(f, (at, BOTTOM + 16.0), "middle", &(self.x_text)(x))?;
        }
        let centre = f64::midpoint(LEFT, RIGHT);
        text(f, (centre, HEIGHT - 6.0), "middle", self.x_label)?;
        let middle = f64::midpoint(TOP, BOTTOM);
        let turned = format!("middle\" transform=\"rotate(-90 14 {middle})");
        text(f, (14.0, middle), &turned, self.y_label)
    }

    fn line(&self, f: &mut Formatter<'_>, bounds: &Bounds, line: &Line) -> fmt::Result {
        let Line { name, colour, .. } = line;
        let dash = if line.is_dashed { "5 4" } else { "none" };
        let place =
            |(x, y): &(u64, Spread)| format!("{:.1},{:.1}", bounds.x(*x), bounds.y(y.median));
        let points: Vec<_> = line.points.iter().map(place).collect();
        let points = points.join(" ");
        writeln!(
            f,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
             stroke-dasharray=\"{dash}\"/>"
        )?;
        for (x, y) in &line.points {
            let (cx, at) = (bounds.x(*x), (self.x_text)(*x));
            let [least, cy, most] = [y.least, y.median, y.most].map(|y| bounds.y(y));
            let label = format!("{} {}", short(y.median), self.y_label);
            let range = format!("{}..{}", short(y.least), short(y.most));
            writeln!(
                f,
                "<path d=\"M{cx:.1} {least:.1}V{most:.1}\" stroke=\"{colour}\"/>\
                 <circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\" fill=\"{colour}\">\
                 <title>{name} at {at}: {label} ({range})</title></circle>"
            )?;
        }
        Ok(())
    }
}

fn rule(f: &mut Formatter<'_>, from: (f64, f64), to: (f64, f64)) -> fmt::Result {
    let ((x1, y1), (x2, y2)) = (from, to);
    writeln!(
        f,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    )
}

fn text(f: &mut Formatter<'_>, at: (f64, f64), anchor: &str, what: &str) -> fmt::Result {
    let (x, y) = at;
    writeln!(
        f,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>"
    )
}

/// Three digits and a letter for thousands or millions.
pub(super) fn short(figure: f64) -> String {
    let (figure, unit) = match figure {
        1e6.. => (figure / 1e6, "M"),
        1e3.. => (figure / 1e3, "k"),
        _ => (figure, ""),
    };
    let digits = match figure {
        99.95.. => 0,
        9.995.. => 1,
        _ => 2,
    };
    let text = format!("{figure:.digits$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text}{unit}")
}

// The picture, in its own units.
const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 450.0;
const TOP: f64 = 28.0;
const BOTTOM: f64 = 252.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        let written = [0.25, 7.0, 12.34, 250.0, 1500.0, 2e6, 123_456.0].map(short);
        assert_eq!(written, ["0.25", "7", "12.3", "250", "1.5k", "2M", "123k"]);
    }

    #[test]
    fn greater_figures_stand_higher_and_inside() {
        let line = |points| Line {
            name: "one",
            colour: "red",
            is_dashed: false,
            points,
        };
        let plot = |points: Vec<(u64, f64)>| Plot {
            title: "a plot".into(),
            x_label: "depth",
            y_label: "us",
            x_text: |x| x.to_string(),
            lines: vec![line(
                points
                    .into_iter()
                    .map(|(x, y)| (x, Spread::of(vec![y / 1.2, y, y * 1.2])))
                    .collect(),
            )],
        };
        let many = plot(vec![(1, 3.0), (8, 40.0), (64, 900.0)]);
        let bounds = many.bounds().unwrap();
        assert!(bounds.y(900.0) < bounds.y(40.0) && bounds.y(40.0) < bounds.y(3.0));
        for (x, y) in [(1, 3.0 / 1.2), (64, 900.0 * 1.2)] {
            assert!((LEFT..RIGHT).contains(&bounds.x(x)));
            assert!((TOP..BOTTOM).contains(&bounds.y(y)));
        }
        assert!((bounds.x(8) - f64::midpoint(bounds.x(1), bounds.x(64))).abs() < 0.01);
        assert!(!bounds.ticks().is_empty());
        for text in [plot(Vec::new()), plot(vec![(4, 5.0)])].map(|plot| plot.to_string()) {
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
    }
}
