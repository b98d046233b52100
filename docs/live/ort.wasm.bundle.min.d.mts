// As much of onnxruntime-web as worker.js uses.
export const env: any;
export const Tensor: any;
export const InferenceSession: any;
