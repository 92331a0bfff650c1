"""How the embedded CLIP is built, stage by stage; scripts/build_embedded_clip.py runs them."""
