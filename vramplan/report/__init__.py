"""Tables and pages that people read: Markdown, HTML, CSV."""
