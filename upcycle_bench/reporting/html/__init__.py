"""Leaderboards as one HTML page, which asks for nothing from outside: `page.render` writes it."""
