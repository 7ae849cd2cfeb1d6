//! What the demo says: lines for people, or one JSON object an event.

use std::io::Write;
use std::time::Instant;

use serde_json::{Map, Value};

/// Tells the story on standard output.
#[derive(Debug)]
pub(super) struct Story {
    json: bool,
    started: Instant,
    step: u32,
}

impl Story {
    pub(super) fn new(json: bool) -> Self {
        Self { json, started: Instant::now(), step: 0 }
    }

    /// A new step begins.
    pub(super) fn step(&mut self, name: &str, title: &str) {
        self.step += 1;
        let text = format!("\n{}. {title}", self.step);
        self.tell("step", &text, serde_json::json!({ "step": self.step, "name": name, "title": title }));
    }

    /// Something happened: `text` for people, `fields` for programs.
    pub(super) fn tell(&self, event: &str, text: &str, fields: Value) {
        let line = if self.json {
            self.object(event, fields)
        } else if event == "step" {
            text.to_owned()
        } else {
            text.lines().map(|line| format!("   {line}")).collect::<Vec<_>>().join("\n")
        };
        // Whoever reads may go away (`| head`); the demo itself is not harmed.
        let _ = writeln!(std::io::stdout(), "{line}");
    }

    fn object(&self, event: &str, fields: Value) -> String {
        let mut object = Map::new();
        object.insert("event".into(), event.into());
        object.insert("at_ms".into(), u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX).into());
        if let Value::Object(fields) = fields {
            object.extend(fields);
        }
        Value::Object(object).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_of_json_that_starts_with_its_name() {
        let story = Story::new(true);
        let line = story.object("cut", serde_json::json!({ "text": "a\nb", "cut_ms": 1.5 }));
        assert!(line.starts_with(r#"{"event":"cut","at_ms":"#) && !line.contains('\n'), "{line}");
        let value: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(value["cut_ms"], 1.5);
    }
}
