"""`python app.py`: the explorer's opening as a Gradio app, as a Space of Hugging Face starts it."""

from moevision.demo import blocks
from moevision.demo.wire import MAX_BYTES

if __name__ == "__main__":
    blocks().launch(max_file_size=MAX_BYTES)
