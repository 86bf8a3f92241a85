//! Latency over rate, as SVG.

use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const MARGIN: f64 = 60.0;

/// Latencies at a rate.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Answers per second.
    pub rps: f64,
    /// Median, ms.
    pub p50_ms: f64,
    /// 99 %, ms.
    pub p99_ms: f64,
    /// 99.9 %, ms.
    pub p999_ms: f64,
}

/// Name, colour, value.
type Series = (&'static str, &'static str, fn(&Point) -> f64);

/// p50, p99 and p99.9 over the rate; the latency axis is logarithmic. `mark` is a rate and a latency, ms, that lines are drawn at.
pub fn latency_over_rate(points: &[Point], mark: Option<(f64, f64)>) -> String {
    let series: [Series; 3] =
        [("p50", "#1b7f5c", |r| r.p50_ms), ("p99", "#c8662b", |r| r.p99_ms), ("p99.9", "#8a3b8f", |r| r.p999_ms)];
    let values = || points.iter().flat_map(|r| [r.p50_ms, r.p999_ms]).filter(|v| *v > 0.0);
    let low = values().fold(f64::INFINITY, f64::min).min(1.0).log10().floor();
    let high = values().fold(0.0, f64::max).max(1.0).log10().ceil().max(low + 1.0);
    let most = points.iter().map(|p| p.rps).fold(1.0, f64::max) * 1.05;
    let x = |rps: f64| MARGIN + (WIDTH - 2.0 * MARGIN) * rps / most;
    let y = |ms: f64| HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * (ms.max(1e-6).log10() - low) / (high - low);
    let mut out = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' font-family='sans-serif' font-size='12'>\n\
         <rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>\n"
    );
    for decade in low as i32..=high as i32 {
        let (ms, at) = (10f64.powi(decade), y(10f64.powi(decade)));
        let _ = writeln!(
            out,
            "<line x1='{MARGIN}' x2='{}' y1='{at:.1}' y2='{at:.1}' stroke='#ddd'/><text x='{}' y='{:.1}' \
             text-anchor='end'>{ms} ms</text>",
            WIDTH - MARGIN,
            MARGIN - 6.0,
            at + 4.0
        );
    }
    for tick in 0..=5 {
        let rps = most * f64::from(tick) / 5.0;
        let _ = writeln!(
            out,
            "<text x='{:.1}' y='{}' text-anchor='middle'>{rps:.0}</text>",
            x(rps),
            HEIGHT - MARGIN + 18.0
        );
    }
    let _ =
        writeln!(out, "<text x='{}' y='{}' text-anchor='middle'>answers per second</text>", WIDTH / 2.0, HEIGHT - 14.0);
    for (at, (name, colour, of)) in series.iter().enumerate() {
        let places: Vec<String> = points.iter().map(|r| format!("{:.1},{:.1}", x(r.rps), y(of(r)))).collect();
        let _ = writeln!(
            out,
            "<polyline fill='none' stroke='{colour}' stroke-width='2' points='{}'/><text x='{}' y='{}' \
             fill='{colour}'>{name}</text>",
            places.join(" "),
            MARGIN + 12.0 + 60.0 * at as f64,
            MARGIN - 16.0
        );
        for point in places {
            let (cx, cy) = point.split_once(',').unwrap_or(("0", "0"));
            let _ = writeln!(out, "<circle cx='{cx}' cy='{cy}' r='3' fill='{colour}'/>");
        }
    }
    if let Some((rps, ms)) = mark {
        let (x, y, right, bottom) = (x(rps), y(ms), WIDTH - MARGIN, HEIGHT - MARGIN);
        let _ = writeln!(
            out,
            "<path d='M{x:.1} {MARGIN}V{bottom}M{MARGIN} {y:.1}H{right}' stroke='#555' stroke-dasharray='4 4' fill='none'/>"
        );
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_drawn() {
        let point = |rps: f64| Point { rps, p50_ms: 0.5, p99_ms: 2.0, p999_ms: 20.0 };
        let points = [point(100.0), point(200.0)];
        let svg = latency_over_rate(&points, None);
        assert_eq!((svg.matches("<circle").count(), svg.matches("<path").count()), (6, 0));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && !svg.contains("NaN"));
        assert_eq!(latency_over_rate(&points, Some((150.0, 2.0))).matches("<path").count(), 1);
    }
}
