"""The largest temporaries, of the text of a small program for a TPU, shortened."""
from keye_jax import temporaries

HLO = '''HloModule jit_f, is_scheduled=true
FileNames
1 "a.py"

%fused_computation.9 (param_0.1: bf16[6,1024,2048]) -> bf16[6,1024,2048] {
  %big.1 = f32[9000,9000]{1,0:T(8,128)} broadcast(%param_0.1), metadata={op_name="inside a fusion"}
  ROOT %dus.1 = bf16[6,1024,2048]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0.1, %big.1)
}

%body (arg: (s32[], f32[1024,4096])) -> (s32[], f32[1024,4096]) {
  %arg = (s32[]{:T(128)}, f32[1024,4096]{1,0:T(8,128)S(1)}) parameter(0)
  %gte.1 = f32[1024,4096]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %near.1 = f32[4096,4096]{1,0:T(8,128)S(1)} copy(%gte.1), metadata={op_name="in VMEM"}
  %copy-start.1 = (f32[1024,4096]{1,0:T(8,128)S(1)}, f32[1024,4096]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%gte.1)
  %fusion.9 = bf16[6,1024,2048]{2,1,0:T(8,128)(2,1)} fusion(%gte.1), kind=kLoop, calls=%fused_computation.9, metadata={op_name="jit(f)/while/body/saved" stack_frame_id=8}
  %call.1 = (f32[1024,3]{1,0:T(8,128)}, /*index=1*/pred[16]{0:T(512)}) custom-call(%gte.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/while/body/kernel"}
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[1024,4096]{1,0:T(8,128)S(1)}) tuple(%gte.1, %gte.1)
}

ENTRY %main (w: f32[6,2048,4096]) -> f32[] {
  %w = f32[6,2048,4096]{2,1,0:T(8,128)} parameter(0)
  %convert.1 = bf16[6,2048,4096]{1,2,0:T(8,128)(2,1)} convert(%w)
  %small.1 = bf16[3,1024,4]{1,2,0:T(4,128)(2,1)} copy(%convert.1), metadata={op_name="jit(f)/b"}
  ROOT %sum.1 = f32[]{:T(128)} reduce(%convert.1), metadata={op_name="jit(f)/sum"}
}
'''  # noqa: E501


def test_what_is_in_hbm_and_no_view_of_another_array_with_its_padding():
  found = temporaries.largest(HLO, 9)
  assert [(x['bytes'], x['shape'], x['op']) for x in found] == [
      (6 * 2048 * 4096 * 2, 'bf16[6,2048,4096]', 'convert'),
      (6 * 1024 * 2048 * 2, 'bf16[6,1024,2048]', 'jit(f)/while/body/saved'),
      (1024 * 128 * 4, 'f32[1024,3]', 'jit(f)/while/body/kernel'),
      (3 * 1024 * 4 * 2, 'bf16[3,1024,4]', 'jit(f)/b'),
      (512, 'pred[16]', 'jit(f)/while/body/kernel'),
      (4, 'f32[]', 'jit(f)/sum')]
  assert temporaries.largest(HLO, 1) == found[:1]
