"""Bodies of foreign engines: a real vLLM server, its OpenAI API, and the commands recipes turn into."""
