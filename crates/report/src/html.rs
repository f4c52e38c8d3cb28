//! The report's page: one HTML file with its style sheet, charts and pictures inside, and no script.

use std::fmt::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fewstep_data::image::Picture;

use crate::charts::{COLOURS, Chart, NARROW, WIDE, escape};
use crate::report::{Grid, GridRow, Report, Row, Stage};
use crate::table::{Better, COLUMNS, Column, is_compared};

/// What all pages share.
pub(crate) const STYLE: &str = include_str!("style.css");
const EVALUATION_STYLE: &str = include_str!("evaluation.css");

/// The whole page.
pub(crate) fn page(report: &Report) -> String {
    let title = escape(&report.title);
    let sections = [
        section("What you see", &paragraphs(&report.summary)),
        section("Results", &results(&report.rows)),
        section("Pictures", &pictures(&report.grids)),
        section("Curves", &charts(&report.charts)),
        section("Time", &stages(&report.stages)),
        section("Notes", &notes(&report.notes)),
    ];
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>\n{STYLE}{EVALUATION_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<p class=\"facts\">{}</p>\n{}</main>\n</body>\n</html>\n",
        escape(&facts(report)),
        sections.concat(),
    )
}

/// A headed section; nothing when there is nothing in it.
fn section(heading: &str, body: &str) -> String {
    if body.is_empty() { String::new() } else { format!("<section>\n<h2>{heading}</h2>\n{body}</section>\n") }
}

fn facts(report: &Report) -> String {
    let counts = report.counts.iter().map(|(name, count)| format!("{count} {}", name.replace('_', " ")));
    let seeds = (!report.seeds.is_empty()).then(|| format!("seeds {}", seed_list(&report.seeds)));
    counts.chain(seeds).collect::<Vec<_>>().join(" · ")
}

/// Seeds one by one, or as a range when there are many in a row.
fn seed_list(seeds: &[u64]) -> String {
    let consecutive = seeds.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]));
    match seeds {
        [first, _, _, .., last] if consecutive => format!("{first} to {last}"),
        _ => seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
    }
}

fn paragraphs(text: &str) -> String {
    let parts = text.split("\n\n").map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| format!("<p>{}</p>\n", escape(part))).collect()
}

fn results(rows: &[Row]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let best: Vec<_> = COLUMNS.iter().map(|column| column.best(rows)).collect();
    let heads: String = COLUMNS.iter().map(column_head).collect();
    let mut table = format!(
        "<div class=\"scroll\"><table class=\"results\">\n<thead><tr><th>model</th><th>steps</th><th>guidance</th>{heads}</tr></thead>\n<tbody>\n"
    );
    for row in rows {
        let class = if is_compared(row) { "" } else { " class=\"reference\"" };
        let (name, steps, guidance) = (escape(&row.name), row.num_inference_steps, row.cfg_scale);
        let _ = write!(table, "<tr{class}><td>{name}</td><td>{steps}</td><td>{guidance}</td>");
        for (column, best) in COLUMNS.iter().zip(&best) {
            let class = if column.is_best(row, *best) { " class=\"best\"" } else { "" };
            let _ = write!(table, "<td{class}>{}</td>", column.text(row));
        }
        table += "</tr>\n";
    }
    let meanings: String =
        COLUMNS.iter().map(|c| format!("<dt>{}</dt><dd>{}</dd>\n", c.label, c.meaning)).collect();
    table
        + "</tbody></table></div>\n<p class=\"note\">Marked: the best of each column among the rows compared with the teacher.</p>\n"
        + &format!("<details><summary>What the columns say</summary>\n<dl>\n{meanings}</dl></details>\n")
}

fn column_head(column: &Column) -> String {
    let (arrow, words) = match column.better {
        Better::Lower => ("↓", "lower is better"),
        Better::Higher => ("↑", "higher is better"),
    };
    format!("<th>{} <span class=\"better\" title=\"{words}\">{arrow}</span></th>", column.label)
}

fn pictures(grids: &[Grid]) -> String {
    let tables: String = grids.iter().map(grid).collect();
    if tables.is_empty() {
        return tables;
    }
    format!(
        "<p class=\"note\">One prompt and one seed per row: every column starts from the same noise.</p>\n\
         <label class=\"toggle\"><input type=\"checkbox\" id=\"pixels\"> show single pixels</label>\n{tables}"
    )
}

fn grid(grid: &Grid) -> String {
    let heads: String =
        grid.columns.iter().map(|name| format!("<th scope=\"col\">{}</th>", escape(name))).collect();
    let rows: String = grid.rows.iter().map(|row| grid_row(row, &grid.columns)).collect();
    format!(
        "<h3>{}</h3>\n<div class=\"scroll\"><table class=\"pictures\" style=\"--columns:{}\">\n<thead><tr><th scope=\"row\"></th>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n",
        escape(&grid.title),
        grid.columns.len(),
    )
}

fn grid_row(row: &GridRow, columns: &[String]) -> String {
    let prompt = escape(&row.prompt);
    let seed = row.seed.map_or(String::new(), |seed| format!("<span class=\"seed\">seed {seed}</span>"));
    let cell = |(column, picture): (&String, &Option<Picture>)| match picture {
        Some(picture) => {
            let png = STANDARD.encode(picture.to_png());
            format!("<td><img alt=\"{}: {prompt}\" src=\"data:image/png;base64,{png}\"></td>", escape(column))
        }
        None => "<td></td>".to_owned(),
    };
    let cells: String = columns.iter().zip(&row.pictures).map(cell).collect();
    format!("<tr><th scope=\"row\">{prompt}{seed}</th>{cells}</tr>\n")
}

fn charts(charts: &[Chart]) -> String {
    let figures: String = charts.iter().map(figure).collect();
    if figures.is_empty() { figures } else { format!("<div class=\"charts\">\n{figures}</div>\n") }
}

/// A chart with title and legend; empty when no point can be drawn.
pub(crate) fn figure(chart: &Chart) -> String {
    let svgs = [chart.svg(WIDE), chart.svg(NARROW)].concat();
    if svgs.is_empty() {
        return svgs;
    }
    let entry = |(index, name): (usize, &str)| {
        format!("<span><i class=\"c{}\"></i>{}</span>", index % COLOURS, escape(name))
    };
    let legend: String =
        chart.curves.iter().map(|curve| curve.name.as_str()).enumerate().map(entry).collect();
    format!(
        "<figure><figcaption>{}<div class=\"legend\">{legend}</div></figcaption>{svgs}</figure>\n",
        escape(&chart.title)
    )
}

fn stages(stages: &[Stage]) -> String {
    let longest = stages.iter().map(|stage| stage.secs).fold(0.0, f64::max);
    if longest <= 0.0 {
        return String::new();
    }
    let total: f64 = stages.iter().map(|stage| stage.secs).sum();
    let row = |stage: &Stage| {
        let (name, width) = (escape(&stage.name), 100.0 * stage.secs / longest);
        format!(
            "<tr><td>{name}</td><td>{}</td><td><i style=\"width:{width:.1}%\"></i></td></tr>\n",
            duration(stage.secs)
        )
    };
    let rows: String = stages.iter().map(row).collect();
    format!(
        "<table class=\"stages\">\n{rows}<tr><td><b>together</b></td><td><b>{}</b></td><td></td></tr>\n</table>\n",
        duration(total)
    )
}

/// Seconds as a person says them.
pub(crate) fn duration(secs: f64) -> String {
    let whole = secs.round() as u64;
    match whole {
        0..10 => format!("{secs:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

fn notes(notes: &[String]) -> String {
    let items: String = notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
    if items.is_empty() { items } else { format!("<ul class=\"notes\">\n{items}</ul>\n") }
}
