//! Icon sets in Iconify's JSON format, rendered to pictures.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use fewstep_data::emoji::SIDE_PX;
use fewstep_data::image::Picture;
use flate2::read::GzDecoder;
use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{Options, Tree};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::captions::code_points;

/// An icon set with its map from code points to icon names.
pub(crate) struct IconSet {
    icons: Icons,
    names: HashMap<String, String>,
}

/// `icons.json`.
#[derive(Deserialize)]
struct Icons {
    icons: HashMap<String, Icon>,
    #[serde(default)]
    aliases: HashMap<String, Alias>,
    width: f32,
    height: f32,
}

/// A drawing: the inside of an svg element. Hidden ones were withdrawn upstream.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Icon {
    body: String,
    width: Option<f32>,
    height: Option<f32>,
    #[serde(default)]
    hidden: bool,
}

/// Another icon under a new name, perhaps mirrored. Unknown transformations are refused rather than left out.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Alias {
    parent: String,
    #[serde(default, rename = "hFlip")]
    mirrored: bool,
}

impl IconSet {
    /// Reads a package as npm ships it.
    pub(crate) fn read(package: &Path) -> Result<Self> {
        let names: HashMap<String, String> = member(package, "package/chars.json")?;
        let names = names.into_iter().map(|(points, name)| (code_points(&points), name)).collect();
        Ok(Self { icons: member(package, "package/icons.json")?, names })
    }

    /// Whether the set shows an emoji.
    pub(crate) fn draws(&self, points: &str) -> bool {
        self.names.get(points).is_some_and(|name| self.icons.find(name).is_some_and(|(icon, _)| !icon.hidden))
    }

    /// Renders an emoji that the set draws.
    pub(crate) fn picture(&self, points: &str) -> Result<Picture> {
        let name = self.names.get(points).with_context(|| format!("no icon for {points}"))?;
        let (icon, mirrored) = self.icons.find(name).with_context(|| format!("no icon {name}"))?;
        let size = (icon.width.unwrap_or(self.icons.width), icon.height.unwrap_or(self.icons.height));
        render(&svg(&icon.body, size, mirrored)).with_context(|| format!("icon {name}"))
    }
}

impl Icons {
    /// An icon by its name or alias, and whether it is to be mirrored.
    fn find(&self, name: &str) -> Option<(&Icon, bool)> {
        let alias = self.aliases.get(name);
        let icon = self.icons.get(alias.map_or(name, |alias| &alias.parent))?;
        Some((icon, alias.is_some_and(|alias| alias.mirrored)))
    }
}

/// A JSON file inside a gzipped tar archive.
fn member<T: DeserializeOwned>(package: &Path, wanted: &str) -> Result<T> {
    let file = File::open(package).with_context(|| package.display().to_string())?;
    for entry in tar::Archive::new(GzDecoder::new(file)).entries()? {
        let mut entry = entry.with_context(|| package.display().to_string())?;
        if entry.path()?.as_os_str() == wanted {
            let mut text = String::new();
            entry.read_to_string(&mut text)?;
            return serde_json::from_str(&text).with_context(|| format!("{}: {wanted}", package.display()));
        }
    }
    bail!("{}: {wanted} is missing", package.display())
}

fn svg(body: &str, (width, height): (f32, f32), mirrored: bool) -> String {
    let mirror = if mirrored { format!("translate({width} 0) scale(-1 1)") } else { String::new() };
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' xmlns:xlink='http://www.w3.org/1999/xlink' \
         width='{width}' height='{height}' viewBox='0 0 {width} {height}'><g transform='{mirror}'>{body}</g></svg>"
    )
}

/// Draws on white, as large as fits and in the middle.
fn render(svg: &str) -> Result<Picture> {
    let tree = Tree::from_str(svg, &Options::default())?;
    let (width, height) = (tree.size().width(), tree.size().height());
    let side = SIDE_PX as f32;
    let scale = side / width.max(height);
    let (left, top) = ((side - scale * width) / 2.0, (side - scale * height) / 2.0);
    let mut canvas = Pixmap::new(SIDE_PX as u32, SIDE_PX as u32).context("a canvas of positive size")?;
    canvas.fill(Color::WHITE);
    resvg::render(&tree, Transform::from_row(scale, 0.0, 0.0, scale, left, top), &mut canvas.as_mut());
    let rgb = canvas.pixels().iter().flat_map(|pixel| [pixel.red(), pixel.green(), pixel.blue()]).collect();
    Ok(Picture { width: SIDE_PX, height: SIDE_PX, rgb })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEFT_HALF: &str = "<path fill='#ff0000' d='M0 0h16v32h-16z'/>";

    fn at(picture: &Picture, x: usize, y: usize) -> [u8; 3] {
        let start = 3 * (y * picture.width + x);
        [picture.rgb[start], picture.rgb[start + 1], picture.rgb[start + 2]]
    }

    #[test]
    fn icons_are_drawn_on_white_and_mirrored_when_asked() {
        let (red, white) = ([255, 0, 0], [255; 3]);
        let plain = render(&svg(LEFT_HALF, (32.0, 32.0), false)).unwrap();
        assert_eq!((at(&plain, 5, 30), at(&plain, 60, 30)), (red, white));
        let mirrored = render(&svg(LEFT_HALF, (32.0, 32.0), true)).unwrap();
        assert_eq!((at(&mirrored, 5, 30), at(&mirrored, 60, 30)), (white, red));
    }

    #[test]
    fn narrow_icons_stand_in_the_middle() {
        let picture = render(&svg("<path d='M0 0h16v32h-16z'/>", (16.0, 32.0), false)).unwrap();
        assert_eq!([10, 20, 43, 53].map(|x| at(&picture, x, 30)[0]), [255, 0, 0, 255]);
    }

    #[test]
    fn an_alias_with_an_unknown_transformation_is_refused() {
        assert!(serde_json::from_str::<Alias>(r#"{"parent": "a", "rotate": 1}"#).is_err());
    }
}
