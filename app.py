"""`python app.py`: the explorer's opening as a Gradio app, as a Space of Hugging Face starts it."""

from moevision.demo import blocks

if __name__ == "__main__":
    blocks().launch()
