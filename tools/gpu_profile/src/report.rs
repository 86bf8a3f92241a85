//! Both on one time axis.

use std::fmt::Write as _;

use loadgen::run::{Report, Second};

use crate::dmon::{COLUMNS, Sample};

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 130.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 24.0;
const BOTTOM: f64 = 22.0;

/// A second of the load with what the GPU did in it.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Seconds since the measurement began.
    pub at: f64,
    /// The load's.
    pub load: Second,
    /// Means of the samples within it, in the order of [`COLUMNS`]; `None` without any.
    pub gpu: [Option<f64>; COLUMNS.len()],
}

/// Joins samples of GPU `gpu` to the seconds in which they were taken. `dmon`'s clock has whole seconds, so that a sample counts for the
/// second that ends at most half a second after it began or before it ended.
pub fn join(load: &[Second], samples: &[Sample], gpu: u32) -> Vec<Row> {
    let begin = load.first().map_or(0.0, |second| second.unix - 1.0);
    let row = |second: &Second| {
        let within = |sample: &&Sample| sample.gpu == gpu && (sample.unix + 0.5 - (second.unix - 0.5)).abs() <= 0.5;
        let samples: Vec<&Sample> = samples.iter().filter(within).collect();
        let mean = |column: usize| {
            let values: Vec<f64> = samples.iter().filter_map(|sample| sample.values[column]).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        Row { at: second.unix - begin, load: *second, gpu: std::array::from_fn(mean) }
    };
    load.iter().map(row).collect()
}

/// Comma-separated, for other tools.
pub fn csv(rows: &[Row]) -> String {
    let mut out = String::from("second,answers,p50_ms,p99_ms");
    COLUMNS.iter().for_each(|(_, _, column)| out += &format!(",{column}"));
    for Row { at, load, gpu } in rows {
        let _ = write!(out, "\n{at:.0},{},{:.3},{:.3}", load.ok, load.p50_ms, load.p99_ms);
        gpu.iter().for_each(|value| out += &value.map_or(",".into(), |value| format!(",{value:.1}")));
    }
    out + "\n"
}

/// Lines over time: name and unit, and for each line a colour, a name, and values by time.
type Lines<'a> = [(&'a str, &'a str, Vec<(f64, f64)>)];

fn plot(out: &mut String, top: f64, title: &str, end: f64, lines: &Lines<'_>) {
    let most = lines.iter().flat_map(|line| &line.2).map(|point| point.1).fold(0.0, f64::max);
    let most = if most > 0.0 { most * 1.1 } else { 1.0 };
    let x = |at: f64| LEFT + (WIDTH - LEFT - RIGHT) * at / end.max(1.0);
    let y = |value: f64| top + HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / most;
    let _ = writeln!(out, "<text x='{LEFT}' y='{:.1}' font-weight='bold'>{title}</text>", top + 14.0);
    for share in [0.0, 0.5, 1.0] {
        let (value, at) = (most * share, y(most * share));
        let _ = writeln!(
            out,
            "<line x1='{LEFT}' x2='{:.1}' y1='{at:.1}' y2='{at:.1}' stroke='#ddd'/><text x='{:.1}' y='{:.1}' \
             text-anchor='end'>{value:.*}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            usize::from(most < 20.0),
        );
    }
    for tick in 0..=5 {
        let at = end * f64::from(tick) / 5.0;
        let _ =
            writeln!(out, "<text x='{:.1}' y='{:.1}' text-anchor='middle'>{at:.0} s</text>", x(at), top + HEIGHT - 6.0);
    }
    for (nth, (colour, name, points)) in lines.iter().enumerate() {
        let points: Vec<String> = points.iter().map(|&(at, value)| format!("{:.1},{:.1}", x(at), y(value))).collect();
        let _ =
            writeln!(out, "<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{}'/>", points.join(" "));
        let at = WIDTH - RIGHT - 60.0 * (lines.len() - nth) as f64;
        let _ = writeln!(out, "<text x='{at:.1}' y='{:.1}' fill='{colour}'>{name}</text>", top + 14.0);
    }
}

/// All plots below each other, over the same seconds.
pub fn svg(rows: &[Row]) -> String {
    let end = rows.last().map_or(1.0, |row| row.at);
    let of = |value: &dyn Fn(&Row) -> Option<f64>| -> Vec<(f64, f64)> {
        rows.iter().filter_map(|row| Some((row.at, value(row)?))).collect()
    };
    let height = HEIGHT * (2 + COLUMNS.len()) as f64;
    let mut out = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' font-family='sans-serif' font-size='11'>\n\
         <rect width='{WIDTH}' height='{height}' fill='white'/>\n"
    );
    plot(&mut out, 0.0, "answers a second", end, &[("#1b7f5c", "", of(&|row| Some(row.load.ok as f64)))]);
    let latency =
        [("#1b7f5c", "p50", of(&|row| Some(row.load.p50_ms))), ("#c8662b", "p99", of(&|row| Some(row.load.p99_ms)))];
    plot(&mut out, HEIGHT, "latency, ms", end, &latency);
    for (at, (name, unit, _)) in COLUMNS.iter().enumerate() {
        let line = [("#3b5b8f", "", of(&|row| row.gpu[at]))];
        plot(&mut out, HEIGHT * (at + 2) as f64, &format!("GPU: {name}, {unit}"), end, &line);
    }
    out + "</svg>\n"
}

/// The page: totals, means, plots, and the seconds.
pub fn markdown(rows: &[Row], load: &Report, command: &str) -> String {
    let mut out = format!("# GPU profile\n\n```\n{command}\n```\n\n```\n{load}```\n\n![over time](profile.svg)\n\n");
    let _ = writeln!(out, "| GPU | mean | least | most |\n|---|--:|--:|--:|");
    for (at, (name, unit, _)) in COLUMNS.iter().enumerate() {
        let values: Vec<f64> = rows.iter().filter_map(|row| row.gpu[at]).collect();
        if values.is_empty() {
            let _ = writeln!(out, "| {name} | no reading | | |");
            continue;
        }
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let (least, most) = values.iter().fold((f64::INFINITY, 0.0f64), |(a, b), &v| (a.min(v), b.max(v)));
        let _ = writeln!(out, "| {name}, {unit} | {mean:.0} | {least:.0} | {most:.0} |");
    }
    let head: String = COLUMNS.iter().map(|(name, unit, _)| format!(" {name}, {unit} |")).collect();
    let _ = writeln!(out, "\n| s | answers | p50 ms | p99 ms |{head}\n|--:|{}", "--:|".repeat(3 + COLUMNS.len()));
    for Row { at, load, gpu } in rows {
        let values: String = gpu.iter().map(|v| v.map_or(" |".into(), |v| format!(" {v:.0} |"))).collect();
        let _ = writeln!(out, "| {at:.0} | {} | {:.3} | {:.3} |{values}", load.ok, load.p50_ms, load.p99_ms);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_fall_into_their_seconds() {
        let second = |unix: f64| Second { unix, ok: 10, p50_ms: 1.0, p99_ms: 2.0 };
        let sample = |unix: f64, gpu: u32, sm: f64| {
            let mut values = [None; COLUMNS.len()];
            values[0] = Some(sm);
            Sample { unix, gpu, values }
        };
        // The load's seconds end at a fraction.
        let load = [second(101.25), second(102.25), second(103.25)];
        let samples = [sample(99.0, 0, 1.0), sample(100.0, 0, 50.0), sample(101.0, 0, 70.0), sample(101.0, 1, 5.0)];
        let rows = join(&load, &samples, 0);
        assert_eq!(rows.iter().map(|row| row.at).collect::<Vec<_>>(), [1.0, 2.0, 3.0]);
        assert_eq!(rows.iter().map(|row| row.gpu[0]).collect::<Vec<_>>(), [Some(50.0), Some(70.0), None]);
        assert!(
            csv(&rows).ends_with("\n1,10,1.000,2.000,50.0,,,,,\n2,10,1.000,2.000,70.0,,,,,\n3,10,1.000,2.000,,,,,,\n")
        );
        let svg = svg(&rows);
        assert!(svg.matches("<polyline").count() == 9 && svg.trim_end().ends_with("</svg>"), "{svg}");
        let page = markdown(&rows, &Report::default(), "x");
        assert!(
            page.contains("| utilisation, % | 60 | 50 | 70 |") && page.contains("| power | no reading | | |"),
            "{page}"
        );
    }
}
