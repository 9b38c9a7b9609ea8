"""`vistok demo`: a local page to look at tokenizers and at what token compression keeps. Only `page` knows Gradio."""
