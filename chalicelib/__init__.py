"""The service: everything that ships, but the routes, which stand in app.py."""
