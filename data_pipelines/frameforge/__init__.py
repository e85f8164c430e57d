"""FrameForge: real H.264 files of handwritten digits over real backgrounds, with questions that have exact answers.

    data_pipelines.frameforge.build('data/frameforge')       # three JSONL files and their media
"""
from data_pipelines.frameforge.build import KINDS as KINDS
from data_pipelines.frameforge.build import build as build
from data_pipelines.frameforge.sheet import contact_sheet as contact_sheet
