"""A server in OpenAI's form over one engine, and a page that shows what its cache holds."""
